"""Text in, token ids out, and back: tokenizer, chat template, and the streaming decoder."""

from jaxinfer.text.chat import ChatTemplate
from jaxinfer.text.streaming import IncrementalDecoder, StopChecker
from jaxinfer.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "IncrementalDecoder", "StopChecker", "Tokenizer"]
