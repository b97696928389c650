"""Distillation on logits: divergences of two models' next tokens, without ever holding the logits of a batch.

A first pass over chunks of the vocabulary takes both log-sum-exps (Milakov and Gimelshein 2018, algorithm 3), a second
one sums the divergence's terms, which are then elementwise in the two log-probabilities. The gradient is a third pass
that makes each chunk's logits anew, so that nothing of [T, V] lives at any time. C is the tokens of a chunk.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxinfer.parallel import TENSOR

Kind = Literal["forward-kl", "reverse-kl", "jensen-shannon"]
Cap = Callable[[jax.Array], jax.Array]
# What `Model.head` returns: normed hidden states [T, D], output embedding [V, D], and raw products to logits.
Head = tuple[jax.Array, jax.Array, Cap]


@dataclass(frozen=True)
class _Static:
    """What a divergence is, besides its arrays."""

    kind: Kind
    temperature: float
    chunk: int
    student_cap: Cap
    teacher_cap: Cap

    def student(self, raw_TC: jax.Array) -> jax.Array:
        """Logits at the temperature, of raw products."""
        return self.student_cap(raw_TC) / self.temperature

    def teacher(self, raw_TC: jax.Array) -> jax.Array:
        return self.teacher_cap(raw_TC) / self.temperature


def distillation_loss(
    student: Head, teacher: Head, weights_T: jax.Array, kind: Kind, *, temperature: float = 1.0, chunk: int = 8192
) -> jax.Array:
    """Weighted sum over positions of how far the student's next token is from the teacher's.

    With p the teacher and q the student: "forward-kl" is KL(p || q), of Hinton et al. 2015; "reverse-kl" is
    KL(q || p), of Gu et al. 2023 (MiniLLM); "jensen-shannon" is the mean of both models' KL to (p + q) / 2, at most
    log 2. Runs on the mesh in force: each device of its axis "tensor" scans its own part of the vocabulary.

    Args:
      student, teacher: each as `Model.head` returns it; hidden sizes may differ. The teacher has no gradient.
      weights_T: float32. A position of weight 0 is dropped, whatever its hidden states are. No gradient.
      temperature: both models' logits are divided by it. The loss is not multiplied by its square, which Hinton et
        al. do (section 2) to keep the gradient's size beside another loss.
      chunk: tokens of vocabulary whose logits exist at a time, on each device.

    Returns:
      float32, in nats.

    Raises:
      ValueError: an unknown kind; `temperature` or `chunk` out of range; sizes that differ.
    """
    _check(student, teacher, weights_T, kind, temperature, chunk)
    kept_T1 = (weights_T != 0.0)[:, None]
    student_TD, teacher_TD = (jnp.where(kept_T1, hidden_TD, 0) for hidden_TD in (student[0], teacher[0]))
    student_VD, teacher_VD = (jax.reshard(head[1], P(TENSOR, None)) for head in (student, teacher))
    static = _Static(kind, temperature, chunk, student[2], teacher[2])
    teacher_TD, teacher_VD, weights_T = jax.lax.stop_gradient((teacher_TD, teacher_VD, weights_T))
    divergence_T: jax.Array = _divergence(static, student_TD, student_VD, teacher_TD, teacher_VD)
    return jnp.sum(weights_T * divergence_T)


def _check(student: Head, teacher: Head, weights_T: jax.Array, kind: Kind, temperature: float, chunk: int) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(get_args(Kind))}")
    if not (0.0 < temperature < math.inf):
        raise ValueError(f"temperature is {temperature}; it must be positive and finite")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    vocabulary, tokens = student[1].shape[0], student[0].shape[0]
    if teacher[1].shape[0] != vocabulary:
        raise ValueError(f"teacher has {teacher[1].shape[0]} tokens of vocabulary; the student has {vocabulary}")
    if teacher[0].shape[0] != tokens:
        raise ValueError(f"teacher has {teacher[0].shape[0]} positions; the student has {tokens}")
    if weights_T.shape != (tokens,):
        raise ValueError(f"weights_T has shape {weights_T.shape}; the student has {tokens} positions")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(
    static: _Static, student_TD: jax.Array, student_VD: jax.Array, teacher_TD: jax.Array, teacher_VD: jax.Array
) -> jax.Array:
    return _forward(static, student_TD, student_VD, teacher_TD, teacher_VD)[0]


def _forward(static: _Static, *arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The divergence [T], and what its gradient needs."""
    scan = jax.shard_map(partial(_scan_forward, static), in_specs=_ARRAYS, out_specs=P(), check_vma=False)
    divergence_T, *kept = scan(*arrays)
    return divergence_T, (*arrays, *kept)


def _backward(static: _Static, kept: tuple[jax.Array, ...], by_T: jax.Array) -> tuple[jax.Array | None, ...]:
    scan = jax.shard_map(
        partial(_scan_backward, static),
        in_specs=(P(), *_ARRAYS, P(), P(), P()),
        out_specs=(P(), P(TENSOR)),
        check_vma=False,
    )
    return *scan(by_T, *kept), None, None


_divergence.defvjp(_forward, _backward)
_ARRAYS = (P(), P(TENSOR), P(), P(TENSOR))  # the hidden states and the output embedding of student and of teacher


def _scan_forward(
    static: _Static, student_TD: jax.Array, student_VD: jax.Array, teacher_TD: jax.Array, teacher_VD: jax.Array
) -> tuple[jax.Array, ...]:
    """On one device: divergence, both log-sum-exps, and the sum of slopes, all [T] and over the whole vocabulary."""
    starts, chunk_of = _chunks(student_VD.shape[0], static.chunk)

    def normalize(lses: tuple[jax.Array, ...], start: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        _, fresh_1C, student_CD, teacher_CD = chunk_of(start, student_VD, teacher_VD)
        logits = static.student(_raw(student_TD, student_CD)), static.teacher(_raw(teacher_TD, teacher_CD))
        parts = (jax.nn.logsumexp(jnp.where(fresh_1C, logits_TC, -jnp.inf), axis=1) for logits_TC in logits)
        return tuple(map(jnp.logaddexp, lses, parts)), None

    def add(sums: tuple[jax.Array, ...], start: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        _, fresh_1C, student_CD, teacher_CD = chunk_of(start, student_VD, teacher_VD)
        logq_TC = static.student(_raw(student_TD, student_CD)) - student_lse_T[:, None]
        logp_TC = static.teacher(_raw(teacher_TD, teacher_CD)) - teacher_lse_T[:, None]
        terms = (jnp.where(fresh_1C, x_TC, 0.0).sum(axis=1) for x_TC in _terms(static.kind, logp_TC, logq_TC))
        return tuple(map(jnp.add, sums, terms)), None

    zero_T = jnp.zeros(student_TD.shape[0], jnp.float32)
    lses, _ = jax.lax.scan(normalize, (zero_T - jnp.inf, zero_T - jnp.inf), starts)
    student_lse_T, teacher_lse_T = (jax.nn.logsumexp(jax.lax.all_gather(lse_T, TENSOR), axis=0) for lse_T in lses)
    sums, _ = jax.lax.scan(add, (zero_T, zero_T), starts)
    divergence_T, slope_T = jax.lax.psum(sums, TENSOR)
    return divergence_T, student_lse_T, teacher_lse_T, slope_T


def _scan_backward(
    static: _Static, by_T: jax.Array,
    student_TD: jax.Array, student_VD: jax.Array, teacher_TD: jax.Array, teacher_VD: jax.Array,
    student_lse_T: jax.Array, teacher_lse_T: jax.Array, slope_T: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """On one device: gradients by the student's hidden states and by this device's part of its output embedding."""
    starts, chunk_of = _chunks(student_VD.shape[0], static.chunk)

    def add(by: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        by_TD, by_VD = by
        begin, fresh_1C, student_CD, teacher_CD = chunk_of(start, student_VD, teacher_VD)
        logits_TC, pull = jax.vjp(static.student, _raw(student_TD, student_CD))
        logq_TC = logits_TC - student_lse_T[:, None]
        logp_TC = static.teacher(_raw(teacher_TD, teacher_CD)) - teacher_lse_T[:, None]
        _, slopes_TC = _terms(static.kind, logp_TC, logq_TC)
        slopes_TC = slopes_TC - jnp.exp(logq_TC) * slope_T[:, None]  # through the log-sum-exp
        (by_TC,) = pull(jnp.where(fresh_1C, by_T[:, None] * slopes_TC, 0.0))
        by_TD = by_TD + jnp.einsum("TC,CD->TD", by_TC, student_CD.astype(jnp.float32))
        by_CD = jnp.einsum("TC,TD->CD", by_TC, student_TD.astype(jnp.float32)).astype(student_CD.dtype)
        by_CD = by_CD + jax.lax.dynamic_slice_in_dim(by_VD, begin, by_CD.shape[0])  # zero where either is not
        return (by_TD, jax.lax.dynamic_update_slice_in_dim(by_VD, by_CD, begin, axis=0)), None

    none = jnp.zeros(student_TD.shape, jnp.float32), jnp.zeros_like(student_VD)
    (by_TD, by_VD), _ = jax.lax.scan(add, none, starts)
    return jax.lax.psum(by_TD, TENSOR).astype(student_TD.dtype), by_VD


def _chunks(vocabulary: int, chunk: int) -> tuple[jax.Array, Callable[..., tuple[jax.Array, ...]]]:
    """Where the chunks start, and the function from a start and arrays [V, D] to the first row, the mask [1, C] of
    rows that no earlier chunk had, and the arrays' rows [C, D]."""
    chunk = min(chunk, vocabulary)

    def chunk_of(start: jax.Array, *heads: jax.Array) -> tuple[jax.Array, ...]:
        begin = jnp.minimum(start, vocabulary - chunk)  # the last chunk moves back to end with the vocabulary
        fresh_1C = (begin + jnp.arange(chunk, dtype=jnp.int32) >= start)[None, :]
        return begin, fresh_1C, *(jax.lax.dynamic_slice_in_dim(head_VD, begin, chunk) for head_VD in heads)

    return jnp.arange(0, vocabulary, chunk, dtype=jnp.int32), chunk_of


def _raw(hidden_TD: jax.Array, head_CD: jax.Array) -> jax.Array:
    return jnp.einsum("TD,CD->TC", hidden_TD, head_CD, preferred_element_type=jnp.float32)


def _terms(kind: Kind, logp: jax.Array, logq: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A divergence's terms, and their slopes by log q save for a multiple of q, which normalization takes out."""
    p, q, ratio = jnp.exp(logp), jnp.exp(logq), logq - logp
    match kind:
        case "forward-kl":
            return -p * ratio, q - p
        case "reverse-kl":
            return q * ratio, q * ratio
        case "jensen-shannon":
            # log p - log m and log q - log m, where m = (p + q) / 2
            p_to_m, q_to_m = (math.log(2) - jnp.logaddexp(x, 0.0) for x in (ratio, -ratio))
            return 0.5 * (p * p_to_m + q * q_to_m), 0.5 * q * q_to_m
