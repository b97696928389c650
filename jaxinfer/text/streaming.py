"""Text while it is being generated: whole characters only, and nothing past a stop string.

Both classes live as long as one request and are fed one piece after the other.
"""

from collections.abc import Sequence

from jaxinfer.text.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# An unfinished UTF-8 character has at most 3 bytes, and shows as one to three replacement characters.
LONGEST_UNFINISHED = 3
# Tokens without a whole character at their end, after which the bytes are taken to be no UTF-8 at all. Half
# of them stay as context: at one byte a token, they hold the 4 characters that an unfinished one may spoil.
LONGEST_HOLD = 32


class IncrementalDecoder:
    """Turns token ids into text, one at a time.

    The pieces put together equal `decode` of all ids whenever that is valid text, at a cost per token that
    does not grow; after a prompt, what they add to its text. Tokens cannot be decoded alone: a character may be
    split over several of them, and SentencePiece decoders drop the space before the first. So each token is
    decoded after a window of the tokens just before it, and what the window itself shows is cut off again. (The
    exception: ten or more U+FFFD in a row that the model wrote as such are not waited out, and may show as more
    of them.)
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()):
        """Args:
        prompt_ids: what the tokens go on from. Its end is the first context, unless a part of a character ends it.
        """
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the context, then the tokens not yet shown in full
        self._context = 0  # tokens of the window that are context
        self._shown = 0  # characters of the window's text that were returned already
        self._begin([token for token in prompt_ids[-LONGEST_HOLD // 2 :] if self._has_text(token)])

    def push(self, token: int) -> str:
        """The text that `token` completes: often empty, never part of a character."""
        if not self._has_text(token):
            return ""  # it would be a context that hides nothing
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        # Held in full: byte fallback shows a whole run of bytes as U+FFFD while its last character is open.
        held = len(text) - len(text.rstrip(REPLACEMENT))
        hopeless = len(self._window) > LONGEST_HOLD
        if hopeless:
            held = min(held, LONGEST_UNFINISHED)
        end = max(self._shown, len(text) - held)
        piece, self._shown = text[self._shown : end], end
        if held == 0:
            self._slide(self._window[self._context :], held)
        elif hopeless:
            self._slide(self._window[-LONGEST_HOLD // 2 :], held)
        return piece

    def flush(self) -> str:
        """The rest at the end of a generation: an unfinished character shows as U+FFFD."""
        rest = self._tokenizer.decode(self._window)[self._shown :]
        self._window, self._context, self._shown = [], 0, 0
        return rest

    def _begin(self, end: list[int]) -> None:
        """Makes the end of a prompt the context, less tokens of a character that begins before it.

        Byte fallback would show these, and a run of bytes after them, as U+FFFD.
        """
        for start in range(min(len(end), LONGEST_UNFINISHED + 1)):
            if not self._tokenizer.decode(end[start:]).endswith(REPLACEMENT):
                self._slide(end[start:], held=0)
                return

    def _has_text(self, token: int) -> bool:
        return token not in self._tokenizer.special_ids and token < self._tokenizer.vocab_size

    def _slide(self, window: list[int], held: int) -> None:
        """Makes `window` the context, unless it shows nothing: then it cannot stand in for a first token."""
        shown = len(self._tokenizer.decode(window)) - held
        if shown > 0:
            self._window, self._context, self._shown = window, len(window), shown


class StopChecker:
    """Ends a streamed text before the first stop string in it, wherever the pieces are cut.

    Of several matches the one that ends first counts, and of those the longest, so the outcome is that of
    reading the text character by character.
    """

    def __init__(self, stops: Sequence[str]):
        if any(not isinstance(stop, str) or not stop for stop in stops):
            raise ValueError(f"stop must hold strings that are not empty, got {list(stops)}")
        self._stops = tuple(stops)
        self._held = ""
        self._early = 0  # characters of what is held in which no stop string may end
        self.matched: str | None = None  # the stop string that ended the text

    def push(self, piece: str, may_end: bool = True) -> tuple[str, bool]:
        """(text that may be shown now, whether a stop string was reached).

        Where `may_end` is false no stop string ends in the piece, but one that ends later may begin there.
        """
        text = self._held + piece
        early = self._early if may_end else len(text)
        starts = [(text.find(stop, max(0, early + 1 - len(stop))), len(stop)) for stop in self._stops]
        matches = [(start + length, start) for start, length in starts if start >= 0]
        if matches:
            end, start = min(matches)
            self._held, self._early, self.matched = "", 0, text[start:end]
            return text[:start], True
        cut = len(text) - self._open_length(text)
        self._held, self._early = text[cut:], max(0, early - cut)
        return text[:cut], False

    def flush(self) -> str:
        """What was held back, when the generation ends without a stop string."""
        rest, self._held, self._early = self._held, "", 0
        return rest

    def _open_length(self, text: str) -> int:
        """Length of the longest end of `text` with which some stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
