"""The innermost steps of the CPU kernels, written for vector registers in LLVM's language.

Channels are pooled `LANES` at a time, so a cell is a vector of that many numbers, a few registers. The steps
are inlined into the kernels that call them.

For the maximum, floats are held as *keys*: integers of the same order with NaN on top. One vector instruction
then takes a maximum that carries NaN along, where floats need three.

Some arguments travel together, as tuples. A *source* is an array and two numbers, begin and pitch: cell p is
the `LANES` numbers from ``array[begin + p * pitch]`` on. An *area* is first, rows, columns and step: the
cells ``first + y * step + x`` for y < rows and x < columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sppnet.pooling.cpu import LANES, LINE, TILE

# What it makes of a step takes one argument less than the step.
inlined: Callable[[Callable[..., Any]], Callable[..., Any]] = cast(Any, intrinsic)

INT32, INDEX = ir.IntType(32), ir.IntType(64)
AREA = types.UniTuple(types.int64, 4)  # type: ignore[no-untyped-call]


def _vector(numbers: Sequence[int], kind: Any = INT32) -> Any:
    """Return a constant vector of integers."""
    return ir.Constant(ir.VectorType(kind, len(numbers)), list(numbers))


def _spread(builder: Any, number: Any) -> Any:
    """Return a vector that holds `number` in every lane."""
    empty = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    one = builder.insert_element(empty, number, INT32(0))
    return builder.shuffle_vector(one, one, _vector([0] * LANES))


class _Builder:
    """What one call of a step is built with: LLVM's builder, and vectors of the numbers that it works on.

    Parameters
    ----------
    context, builder : numba's context and LLVM's builder
    numbers : numba type
        Of a lane.
    lanes : int
        How many numbers a vector holds.
    """

    def __init__(self, context: Any, builder: Any, numbers: Any, lanes: int) -> None:
        self.context, self.builder = context, builder
        self.vector = ir.VectorType(context.get_data_type(numbers), lanes)
        self.integers = isinstance(self.vector.element, ir.IntType)

    def constant(self, number: float) -> Any:
        """Return a vector that holds the same number in every lane."""
        return ir.Constant(self.vector, [number] * self.vector.count)

    def variable(self, number: float) -> Any:
        """Return a place in memory, or rather in registers, that holds a vector."""
        place = cgutils.alloca_once(self.builder, self.vector)  # type: ignore[no-untyped-call]
        self.builder.store(self.constant(number), place)
        return place

    def address(self, kind: Any, array: Any, index: Any) -> Any:
        """Return a pointer to the vector that begins at element `index` of a contiguous array."""
        data = self.context.make_array(kind)(self.context, self.builder, array).data
        return self.builder.bitcast(self.builder.gep(data, [index]), self.vector.as_pointer())

    def load(self, kind: Any, array: Any, index: Any) -> Any:
        """Return the vector that begins at element `index` of a contiguous array."""
        return self.builder.load(self.address(kind, array, index), align=4)

    def store(self, value: Any, kind: Any, array: Any, index: Any) -> None:
        """Write the vector that begins at element `index` of a contiguous array."""
        self.builder.store(value, self.address(kind, array, index), align=4)

    def cell(self, kind: Any, source: Any, number: Any) -> Any:
        """Return a cell of a source."""
        array, begin, pitch = cgutils.unpack_tuple(self.builder, source, 3)  # type: ignore[no-untyped-call]
        place = self.builder.add(begin, self.builder.mul(number, pitch))
        return self.load(kind.types[0], array, place)

    @contextmanager
    def each_cell(self, area: Any) -> Iterator[Any]:
        """Write a loop over the cells of an area, row by row, around what is built inside."""
        first, rows, columns, step = cgutils.unpack_tuple(self.builder, area, 4)  # type: ignore[no-untyped-call]
        with cgutils.for_range(self.builder, rows) as y:
            row = self.builder.add(first, self.builder.mul(y.index, step))
            with cgutils.for_range(self.builder, columns) as x:
                yield self.builder.add(row, x.index)


def _lowest(kind: Any) -> int:
    return -(1 << (int(kind.width) - 1))


def _mirrored(builder: Any, row: Any) -> Any:
    """Turn the bits of floats into integers of the same order, or back: negative ones change direction."""
    kind, count = row.type.element, row.type.count
    sign = builder.ashr(row, _vector([kind.width - 1] * count, kind))
    return builder.xor(row, builder.and_(sign, _vector([-1 - _lowest(kind)] * count, kind)))


def _keys(builder: Any, row: Any) -> Any:
    """Turn the bits of floats into integers of the same order, every NaN into the largest."""
    kind, count = row.type.element, row.type.count
    magnitude = _vector([-1 - _lowest(kind)] * count, kind)
    infinity = _vector([{32: 0x7F800000, 64: 0x7FF0000000000000}[kind.width]] * count, kind)
    nan = builder.icmp_signed(">", builder.and_(row, magnitude), infinity)
    return builder.select(nan, magnitude, _mirrored(builder, row))


def _source(array: Any) -> Any:
    """Return the type of a source in a kind of array."""
    return types.Tuple((array, types.int64, types.int64))  # type: ignore[no-untyped-call]


def _reducer(raw: bool) -> Callable[..., Any]:
    def reduce(_: Any, target: Any, bin_: Any, source: Any, area: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            target, bin_, source, area = arguments
            own = _Builder(context, builder, signature.args[0].dtype, LANES)
            total = own.variable(_lowest(own.vector.element) if own.integers else 0.0)
            with own.each_cell(area) as number:
                value = own.cell(signature.args[2], source, number)
                old = builder.load(total)
                if own.integers:
                    key = _keys(builder, value) if raw else value
                    new = builder.select(builder.icmp_signed(">", old, key), old, key)
                else:
                    new = builder.fadd(old, value)
                builder.store(new, total)
            result = builder.load(total)
            if not own.integers:
                for k in (1, 2):
                    count = builder.sitofp(builder.extract_value(area, k), own.vector.element)
                    result = builder.fdiv(result, _spread(builder, count))
            own.store(result, signature.args[0], target, builder.mul(bin_, INDEX(LANES)))
            return context.get_dummy_value()

        return types.void(target, types.int64, _source(source.types[0]), AREA), generate

    return inlined(reduce)


# Both reduce an area of a source to ``target[bin_]``: integers to their maximum, floats to their mean.
# Integers are keys of floats, which the second computes from the bits of floats. The accumulator stays in
# registers, which plain loops do not achieve: their compiler must assume that writing the target changes the
# source.
reduce_cells, reduce_maps = _reducer(raw=False), _reducer(raw=True)


def _locator(raw: bool) -> Callable[..., Any]:
    def locate(_: Any, target: Any, target_spots: Any, bin_: Any, source: Any, spots: Any, area: Any) -> Any:
        given = isinstance(spots, types.BaseTuple)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            target, target_spots, bin_, source, spots, area = arguments
            own = _Builder(context, builder, signature.args[0].dtype, LANES)
            best, spot = own.variable(_lowest(own.vector.element)), own.variable(0)
            with own.each_cell(area) as number:
                value = own.cell(signature.args[3], source, number)
                if raw:
                    value = _keys(builder, value)
                old, old_spot = builder.load(best), builder.load(spot)
                better = builder.icmp_signed(">", value, old)
                if given:
                    new_spot = own.cell(signature.args[4], spots, number)
                    tie = builder.icmp_signed("==", value, old)
                    earlier = builder.icmp_signed("<", new_spot, old_spot)
                    better = builder.or_(better, builder.and_(tie, earlier))
                else:
                    # Cells come in row order, so the first of equal ones is there already.
                    if own.vector.element != INDEX:
                        number = builder.trunc(number, own.vector.element)
                    new_spot = _spread(builder, number)
                builder.store(builder.select(better, value, old), best)
                builder.store(builder.select(better, new_spot, old_spot), spot)
            at = builder.mul(bin_, INDEX(LANES))
            own.store(builder.load(best), signature.args[0], target, at)
            own.store(builder.load(spot), signature.args[1], target_spots, at)
            return context.get_dummy_value()

        places = _source(spots.types[0]) if given else spots
        cells = _source(source.types[0])
        return types.void(target, target_spots, types.int64, cells, places, AREA), generate

    return inlined(locate)


# Both reduce integers as `reduce_cells` and `reduce_maps` do, and keep the spot of each maximum, the smallest
# on ties. The spot of a cell is found like the cell itself in the source `spots`, or is the cell's number
# where that is None.
locate_cells, locate_maps = _locator(raw=False), _locator(raw=True)


def _transpose(builder: Any, tile: list[Any]) -> list[Any]:
    """Return the columns of `TILE` vectors: in each round, rows `d` apart exchange off-diagonal squares."""
    lanes = range(TILE)
    for d in (8, 4, 2, 1):
        upper = _vector([TILE + i - d if i & d else i for i in lanes])
        lower = _vector([TILE + i if i & d else i + d for i in lanes])
        for b in [b for b in lanes if not b & d]:
            pair = tile[b], tile[b + d]
            tile[b], tile[b + d] = (builder.shuffle_vector(*pair, mask) for mask in (upper, lower))
    return tile


def _reader(transposed: bool) -> Callable[..., Any]:
    def read(_: Any, rows: Any, row: Any, lane: Any, source: Any, at: Any, stride: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            rows, row, lane, source, at, stride = arguments
            own = _Builder(context, builder, signature.args[0].dtype, TILE)
            tile = []
            for k in range(TILE):
                place = builder.add(at, builder.mul(stride, INDEX(k)))
                value = own.load(signature.args[3], source, place)
                tile.append(_keys(builder, value) if own.integers else value)
            for k, value in enumerate(_transpose(builder, tile) if transposed else tile):
                place = builder.add(builder.mul(builder.add(row, INDEX(k)), INDEX(LANES)), lane)
                own.store(value, signature.args[0], rows, place)
            return context.get_dummy_value()

        integers = [types.int64] * 2
        return types.void(rows, *integers, source, *integers), generate

    return inlined(read)


# Both write a tile of `rows`, from lane `lane` on: keys of floats where they are read as integers. The first
# takes ``source[at + c * stride + p]``, lane c of row p, the other ``source[at + p * stride + c]``.
read_columns, read_rows = _reader(transposed=True), _reader(transposed=False)


@inlined
def write_tile(_: Any, target: Any, place: Any, stride: Any, source: Any, first: Any) -> Any:
    """Write ``source.flat[first + b * LANES + c]`` to ``target[place + c * stride + b]``, b and c < TILE.

    A transposition in registers. Rows are written by rising c. Integers turn back into the bits of floats.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, place, stride, source, first = arguments
        own = _Builder(context, builder, signature.args[0].dtype, TILE)
        tile = []
        for b in range(TILE):
            row = own.load(signature.args[3], source, builder.add(first, INDEX(b * LANES)))
            tile.append(_mirrored(builder, row) if own.integers else row)
        for c, column in enumerate(_transpose(builder, tile)):
            at = builder.add(place, builder.mul(stride, INDEX(c)))
            own.store(column, signature.args[0], target, at)
        return context.get_dummy_value()

    return types.void(target, types.int64, types.int64, source, types.int64), generate


@inlined
def stream(_: Any, target: Any, place: Any, source: Any, first: Any, tiles: Any) -> Any:
    """Copy `tiles` vectors from ``source[first:]`` past the caches, so that what they replace is not read.

    They go to ``target[place:]``, which starts at a cache line.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, place, source, first, tiles = arguments
        own = _Builder(context, builder, signature.args[0].dtype, TILE)
        before = own.address(signature.args[2], source, first)
        after = own.address(signature.args[0], target, place)
        with cgutils.for_range(builder, tiles) as i:
            value = builder.load(builder.gep(before, [i.index]), align=4)
            store = builder.store(value, builder.gep(after, [i.index]), align=LINE)
            store.set_metadata("nontemporal", builder.module.add_metadata([INT32(1)]))
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64, types.int64), generate
