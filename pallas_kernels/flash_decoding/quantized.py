"""Keys and values of 8 bits on their way from shared memory to the tensor cores, through registers.

With 8 bits a number, a tile is there in half the time, and what the warpgroups do with it must fit in that. So each
product has the tile as its first operand, which may lie in registers, and the few query rows as its second: scores
are [keys, rows], values [H, rows], and nothing is padded to 64 rows. A thread loads what it holds of the operand,
converts it to float16, in which every int8 and fp8 (e4m3) number is exact, and never writes it back.

Which rows and columns of the operand a thread holds is fixed by the instruction (PTX ISA, wgmma, "Register
fragments"), but not which component of a head is which of them: those of the queries can come in the same order, and
those of the result be put in order at the end. Here a thread's share of a key are 16 consecutive bytes, and of a
value 4, where the head is wide enough.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_LAYOUT, TiledLayout
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector

from pallas_kernels.flash_decoding.config import TILE_KEYS

OPERAND = jnp.dtype(jnp.float16)
WGMMA = plgpu.Layout.WGMMA
BY_KEY, BY_ROW = WGMMA.reduce(1), WGMMA.reduce(0)
WARPS = 4


def width(head_size: int) -> int:
    """Columns of which the four threads that share a key, or the four warps that share a value, have a quarter."""
    return next(columns for columns in (128, 64, 32) if head_size % columns == 0)


def value_rows(head_size: int) -> int:
    """Rows of the second product: a multiple of 64, of which heads of 96 leave 32 unused."""
    return -(-head_size // 64) * 64


def key_layout(head_size: int) -> TiledLayout:
    """Who loads what of a tile of keys: a warp has 16 keys, a thread a quarter of the columns of two of them."""
    columns = width(head_size)
    tiles = (TILE_KEYS, columns), (16, columns), (8, columns // 4), (1, min(16, columns // 4))
    return TiledLayout(plgpu.Tiling(tiles), (-8,), (-4, -5), -1, _check_canonical=False).canonicalize()


def value_layout(head_size: int) -> TiledLayout:
    """Who loads what of a tile of values: a thread has two keys of every 8, and of each 4, 2 or 1 neighbours."""
    columns = width(head_size)
    tiles = (8, columns), (2, columns // 4), (1, columns // 32)
    return TiledLayout(plgpu.Tiling(tiles), (-5,), (-3, -6), -1, _check_canonical=False).canonicalize()


def query_unit(dtype: jnp.dtype) -> int:
    """What queries are counted in to become float16: bfloat16 ones are exact then from 2^-10 to 2^20 (below, they
    are off by 2^-21)."""
    return 1 if dtype == OPERAND else 16


def in_key_order(x: jax.Array) -> jax.Array:
    """The components of queries or keys in the order of the columns of `keys_operand`.

    Of every `width` components a thread has a quarter: four of them for each instruction, two among its first 8
    columns and two among the others.
    """
    *axes, H = x.shape
    columns, n = width(H), len(axes)
    parts = x.reshape(*axes, H // columns, 4, columns // 16, 2, 2)
    return parts.transpose(*range(n), n, n + 2, n + 3, n + 1, n + 4).reshape(x.shape)


def key_word(head_size: int, sixteen: int) -> tuple[int, int, int]:
    """Where a thread has its four numbers of the nth 16 columns of the operand: block, vector of the block, word."""
    columns = width(head_size)
    block, word = divmod(sixteen, columns // 16)
    return block, *divmod(word, min(4, columns // 16))


def value_slot(head_size: int, row: int) -> tuple[int, int]:
    """What a thread's nth row of `values_operand` is: block of `width` components, and which of its neighbours."""
    return divmod(row, width(head_size) // 32)


def keys_operand(k_smem, operand_smem) -> Any:
    """A tile of keys [64, H] as float16 with the columns `in_key_order`.

    In registers, or in `operand_smem`, where there is one: what the interpreter can follow.
    """
    H = k_smem.shape[-1]
    if operand_smem is not None:
        operand_smem[...] = in_key_order(k_smem[...].astype(jnp.float32)).astype(OPERAND)
        plgpu.commit_smem()
        return operand_smem
    layout = _of(key_layout(H))
    convert = lambda _, x: _operand(key_registers(x.registers, H, x.mlir_dtype))  # noqa: E731
    result = plgpu.ShapeDtypeStruct((TILE_KEYS, H), OPERAND, layout=WGMMA)
    return plgpu.inline_mgpu(arg_types=(layout,), return_type=result)(convert)(plgpu.load(k_smem, layout=layout))


def key_registers(loaded: np.ndarray, head_size: int, dtype: ir.Type) -> np.ndarray:
    """The registers of the operand, pairs of neighbours in a row, from those of a tile in `key_layout`."""
    # [block, lower 8 of a warp's keys or upper, vector], among axes of length 1.
    vectors = loaded.reshape(head_size // width(head_size), 2, -1)
    registers = _no_registers(TILE_KEYS, head_size)
    for sixteen in range(head_size // 16):
        block, nth, word = key_word(head_size, sixteen)
        for half in range(2):
            pairs = _convert(_words(vectors[block, half, nth])[word], dtype)
            for eight, pair in enumerate(pairs):
                registers[_place(0, half, 2 * sixteen + eight)] = pair
    return registers


def values_operand(v_smem, seen: Any, operand_smem) -> Any:
    """A tile of values [64, H] as float16, transposed: [value_rows, 64].

    In registers with the rows in an order that `store_by_row` undoes, or in `operand_smem`. Values of keys that are
    not `seen` are zero: their weights are 0, but they may be NaN.
    """
    H = v_smem.shape[-1]
    if operand_smem is not None:
        v = v_smem[...].astype(jnp.float32)
        key = lax.broadcasted_iota(jnp.int32, v.shape, 0)
        operand_smem[pl.ds(0, H)] = jnp.where(seen.of(key), v, 0.0).astype(OPERAND).T
        plgpu.commit_smem()
        return operand_smem
    layout = _of(value_layout(H))

    def convert(_, x: FragmentedArray, low: FragmentedArray, high: FragmentedArray) -> FragmentedArray:
        kept = None
        if isinstance(x.mlir_dtype, ir.FloatType):  # an integer is never NaN
            is_seen = _is_bit_set if seen.as_bits else _is_in_range
            words = low.registers.item(), high.registers.item()
            kept = [[is_seen(8 * eight + key, *words) for key in range(2)] for eight in range(TILE_KEYS // 8)]
        return _operand(value_registers(x.registers, H, x.mlir_dtype, kept))

    scalar = plgpu.Layout.WG_SPLAT
    result = plgpu.ShapeDtypeStruct((value_rows(H), TILE_KEYS), OPERAND, layout=WGMMA)
    v = plgpu.load(v_smem, layout=layout)
    return plgpu.inline_mgpu(arg_types=(layout, scalar, scalar), return_type=result)(convert)(v, seen.low, seen.high)


def value_registers(
    loaded: np.ndarray, head_size: int, dtype: ir.Type, kept: list[list[ir.Value]] | None
) -> np.ndarray:
    """The same of the transposed operand, from a tile in `value_layout`.

    `kept` says of the two keys that a thread has of every 8 whether their values stay or become zero; None: all stay.
    """
    vectors = loaded.reshape(TILE_KEYS // 8, head_size // width(head_size), 2)  # [keys, block, of two keys]
    registers = _no_registers(value_rows(head_size), TILE_KEYS)
    for eight, blocks in enumerate(vectors):
        words = [[_words(vector)[0] for vector in keys] for keys in blocks]
        if kept is not None:
            words = [[arith.select(k, w, _c(0)) for k, w in zip(kept[eight], pair, strict=True)] for pair in words]
        for group in range(value_rows(head_size) // 64):
            rows = [value_slot(head_size, row) for row in (2 * group, 2 * group + 1)]
            for half, pair in enumerate(_convert(_transposed(words, rows), dtype)):
                registers[_place(group, half, eight)] = pair
    return registers


def store_by_row(values: jax.Array, memory, interpretable: bool) -> None:
    """Writes sums of `values_operand`, [value_rows, N], to memory as [N, H] with the components in order."""
    N, H = memory.shape
    if interpretable:
        memory[...] = values[:H].T
        return

    def store(_, x: FragmentedArray, memory: ir.Value) -> None:
        registers = row_registers(x.registers, N, H)
        rows = FragmentedArray(_registers=registers, _layout=value_layout(H), _is_signed=None)
        rows.store_untiled(memory, optimized=False)

    # The type says that the memory is in no tiles: left open, layout inference finds no solution for an odd N.
    plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType()))(store)(values, memory)


def row_registers(sums: np.ndarray, rows: int, head_size: int) -> np.ndarray:
    """The registers of [rows, H] in `value_layout` from those of the second product, [value_rows, rows]."""
    sums = sums.reshape(-1, rows // 8, 2)  # [group, columns, half], of two columns each
    blocks = head_size // width(head_size)
    registers = np.empty((rows // 8, blocks, 2), object)
    for eight, block, row in np.ndindex(*registers.shape):
        slots = [n for n in range(head_size // 32) if value_slot(head_size, n)[0] == block]
        own = [_one(sums[n // 2, eight, n % 2], row) for n in slots]
        registers[eight, block, row] = _joined(own)
    return registers.reshape(value_layout(head_size).registers_shape((rows, head_size)))


def over_keys(operation: str, x: jax.Array, memory, interpretable: bool) -> jax.Array:
    """The maximum or the sum ("max", "add") of [64, N] over the keys, whose warps meet in `memory`, [4, N].

    A barrier of the warpgroup must lie between two calls.
    """
    if interpretable:
        return x.max(axis=0) if operation == "max" else x.sum(axis=0)
    N = x.shape[1]
    layout = WGMMA_LAYOUT.reduce((0,))

    def reduce(_, x: FragmentedArray, memory: ir.Value) -> FragmentedArray:
        join = {"max": arith.maximumf, "add": arith.addf}[operation]
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        lane, warp = (arith.remui(n, _c(m)) for n, m in ((_thread(), 32), (arith.divui(_thread(), _c(32)), WARPS)))
        columns = [_index(arith.addi(_c(8 * i), arith.muli(_c(2), arith.remui(lane, _c(4))))) for i in range(N // 8)]
        for column, (lower, upper) in zip(columns, x.registers.reshape(N // 8, 2), strict=True):
            own = join(lower, upper)
            for distance in (4, 8, 16):
                own = join(own, utils.shfl_bfly(own, distance))
            vector.store(own, memory, [_index(warp), column])
        utils.warpgroup_barrier()
        registers = np.empty(layout.registers_shape((N,)), object)
        for i, column in enumerate(columns):
            parts = [vector.load(pair, memory, [_index(_c(warp)), column]) for warp in range(WARPS)]
            registers.flat[i] = join(join(parts[0], parts[1]), join(parts[2], parts[3]))
        return FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    result = plgpu.ShapeDtypeStruct((N,), jnp.float32, layout=BY_ROW)
    return plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType()), return_type=result)(reduce)(x, memory)


def _no_registers(rows: int, columns: int) -> np.ndarray:
    return np.empty(WGMMA_LAYOUT.registers_shape((rows, columns)), object)


def _place(group: int, half: int, eight: int) -> tuple[int, ...]:
    """Which register has the pair in a group of 64 rows, the lower or upper 8 of a warp's 16, and some 8 columns."""
    return group, eight, 0, 0, half, 0, 0, 0, 0


def _operand(registers: np.ndarray) -> FragmentedArray:
    return FragmentedArray(_registers=registers, _layout=WGMMA_LAYOUT, _is_signed=None)


def _convert(word: ir.Value, dtype: ir.Type) -> list[ir.Value]:
    """The numbers of a word as two pairs of float16."""
    i32 = _i32()
    if isinstance(dtype, ir.FloatType):
        halves = "mov.b32 {low, high}, $2; cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high;"
        code = f"{{ .reg .b16 low, high; {halves} }}"
    else:
        # As the last 8 bits of a float16, x + 128 makes it 1024 + 128 + x, from which 1152 is taken.
        shift = "xor.b32 x, $2, 0x80808080; mov.b32 bias, 0x64806480;"
        pairs = "prmt.b32 low, x, 0x64646464, 0x4140; prmt.b32 high, x, 0x64646464, 0x4342;"
        code = (
            f"{{ .reg .b32 x, bias, low, high; {shift} {pairs} sub.f16x2 $0, low, bias; sub.f16x2 $1, high, bias; }}"
        )
    pair = ir.VectorType.get((2,), ir.F16Type.get())
    return [utils.bitcast(half, pair) for half in utils.inline_ptx(code, word, result_types=(i32, i32))]


def _transposed(words: list[list[ir.Value]], rows: list[tuple[int, int]]) -> ir.Value:
    """A word of two rows of the operand: of each the numbers of two keys. A row past the last one is zero."""
    (block, first), (next_block, second) = rows
    if next_block == block:
        return _permuted(words[block], (first, 4 + first, second, 4 + second))
    lower = _permuted(words[block], (first, 4 + first, first, first))
    if next_block == len(words):
        return _lower_half(lower)
    upper = _permuted(words[next_block], (second, 4 + second, second, second))
    return _permuted([lower, upper], (0, 1, 4, 5))


def _permuted(words: list[ir.Value], order: tuple[int, ...]) -> ir.Value:
    """Four bytes of the eight of two words."""
    low, high = words
    return utils.prmt(low, high, _c(sum(byte << 4 * i for i, byte in enumerate(order))))


def _lower_half(word: ir.Value) -> ir.Value:
    return arith.andi(word, _c(0xFFFF))


def _words(x: ir.Value) -> list[ir.Value]:
    """A vector of 8-bit numbers as words of 32 bits; a shorter vector is the beginning of one."""
    bits = utils.bitwidth(x.type)
    if bits < 32:
        return [arith.extui(_i32(), utils.bitcast(x, ir.IntegerType.get_signless(bits)))]
    words = vector.bitcast(ir.VectorType.get((bits // 32,), _i32()), x)
    return [vector.extract(words, dynamic_position=[], static_position=[i]) for i in range(bits // 32)]


_one = lambda pair, i: utils.vector_slice(pair, slice(i, i + 1))  # noqa: E731
_joined = utils.vector_concat


def _is_in_range(key: int, low: ir.Value, high: ir.Value) -> ir.Value:
    """Whether low <= key + 2 c < high, for a thread that is number c of four."""
    own, less = _own_key(key), arith.CmpIPredicate
    return arith.andi(arith.cmpi(less.sge, own, low), arith.cmpi(less.slt, own, high))


def _is_bit_set(key: int, low: ir.Value, high: ir.Value) -> ir.Value:
    """Whether bit key + 2 c of two words of 32 is 1; `key` is the first or second of 8, and so are all in one word."""
    word = arith.shrui(low if key < 32 else high, _own_key(key % 32))
    return arith.trunci(ir.IntegerType.get_signless(1), word)


def _own_key(key: int) -> ir.Value:
    return arith.addi(_c(key), arith.muli(_c(2), arith.remui(_thread(), _c(4))))


def _of(layout: TiledLayout) -> Any:
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def _thread() -> ir.Value:
    return utils.thread_idx()


def _index(x: ir.Value) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), x)


def _c(x: int) -> ir.Value:
    return utils.c(x, _i32())


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)
