"""Runs the Hopper kernels' own source on the CPU: Gluon's operations in torch, one thread a warp-specialised partition.

What is emulated is what the kernels rely on: shared memory that starts as NaN, mbarriers with arrivals, expected bytes
and phases, TMA boxes that read zeros outside, products and stores that read shared memory as late as their wait allows,
fences between stores and what reads by another path.
Only one partition runs at a time; at every barrier and copy a seeded draw decides who goes on, so that a buffer
released too early is overwritten before it is read, and partitions that wait for each other are found. Layouts,
registers and what ptxas makes of it all are not emulated.
"""

from __future__ import annotations

import math
import random
import threading
from collections import deque
from types import SimpleNamespace
from typing import Any

import torch
from triton.experimental.gluon import language

UINT32 = "uint32"


class Block(torch.Tensor):
    """A tensor in registers."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        # what torch's own does for every subclass, without its search for tensors in whatever comes out
        with torch._C.DisableTorchFunctionSubclass():
            made = function(*args, **(kwargs or {}))
        return made.as_subclass(cls) if type(made) is torch.Tensor else made

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=None)

    def to(self, dtype: Any, bitcast: bool = False) -> torch.Tensor:
        if dtype == UINT32:
            assert bitcast
            return self.long() & 0xFFFFFFFF
        return super().to(dtype)


def block(x: Any) -> Block:
    return torch.as_tensor(x).as_subclass(Block)


class Pointer:
    def __init__(self, memory: torch.Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, step: Any) -> Pointer:
        return Pointer(self.memory, self.offset + step)


def load(pointer: Pointer) -> Block:
    index = torch.as_tensor(pointer.offset).as_subclass(torch.Tensor).long()
    assert int(index.min()) >= 0 and int(index.max()) < pointer.memory.numel(), "a load out of bounds"
    value = pointer.memory[index]
    return block(value.long() if value.dtype == torch.int32 else value)


def store(pointer: Pointer, value: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    index, value = torch.as_tensor(pointer.offset).as_subclass(torch.Tensor), value.as_subclass(torch.Tensor)
    index, value = torch.broadcast_tensors(index, value)
    if mask is not None:
        keep = mask.as_subclass(torch.Tensor).expand(index.shape)
        index, value = index[keep], value[keep]
    pointer.memory[index.reshape(-1).long()] = value.reshape(-1).to(pointer.memory.dtype)


class Shared:
    """Shared memory; ``index`` and ``permute`` are views."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory, self.dtype = memory, memory.dtype

    def index(self, i: Any) -> Shared:
        return Shared(self.memory[int(i)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.memory.permute(order))

    def load(self, layout: Any) -> Block:
        scheduler.may_switch()
        return block(self.memory.clone())

    def store(self, value: torch.Tensor) -> None:
        scheduler.may_switch()
        # what threads read back themselves needs no fence
        of_threads = self.dtype in (torch.int32, torch.float32)
        assert of_threads or value.dtype == self.dtype, (value.dtype, self.dtype)
        self.memory.copy_(value)
        if not of_threads:
            scheduler.unfenced.append((scheduler.local.number, self.span))

    @property
    def span(self) -> tuple[int, int]:
        return self.memory.data_ptr(), self.memory.data_ptr() + self.memory.nbytes

    def check_fenced(self) -> None:
        """Tensor cores and copies out read by another path than the one that stores take."""
        start, stop = self.span
        assert all(stop <= first or last <= start for _, (first, last) in scheduler.unfenced), "a store is not fenced"


class Barrier:
    """Completes a phase when ``count`` arrivals and all expected bytes are there."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def index(self, i: Any) -> Barrier:
        return self

    def settle(self) -> None:
        assert self.pending >= 0, "more arrivals than the barrier counts"
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


class Barriers:
    def __init__(self, number: int) -> None:
        self.each = [Barrier() for _ in range(number)]

    def index(self, i: Any) -> Barrier:
        return self.each[int(i)]


class Descriptor:
    """[T, H * D] read and written in boxes of [rows, D]."""

    def __init__(self, described: Any) -> None:
        base = described.base
        shape, strides = described.shape, described.strides
        self.memory = torch.as_strided(base, tuple(shape), tuple(strides), base.storage_offset())
        self.box, self.dtype, self.layout = described.block_shape, base.dtype, None
        self.block_type = SimpleNamespace(nbytes=math.prod(self.box) * base.element_size())

    def part(self, corner: list[Any]) -> tuple[torch.Tensor, int]:
        row, column = map(int, corner)
        assert row >= 0 and 0 <= column <= self.memory.shape[1] - self.box[1]
        part = self.memory[row : row + self.box[0], column : column + self.box[1]]
        return part, part.shape[0]


class Product:
    """A wgmma in flight: its operands in shared memory are read when it is waited for."""

    def __init__(self, a: Any, b: Shared, acc: torch.Tensor, use_acc: bool) -> None:
        assert not isinstance(a, Product) and not isinstance(acc, Product), "a product's result is used before its wait"
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.value: Block | None = None

    def finish(self) -> None:
        a = self.a.memory if isinstance(self.a, Shared) else self.a
        assert a.dtype == self.b.dtype, (a.dtype, self.b.dtype)
        self.value = block(a.as_subclass(torch.Tensor).float() @ self.b.memory.float())
        if self.use_acc:
            self.value = self.value + self.acc


class Scheduler:
    """Lets one partition run at a time."""

    def __init__(self) -> None:
        self.draw = random.Random(0)
        self.local = threading.local()
        self.turns: list[threading.Lock] = []
        self.blocked: dict[int, Any] = {}
        self.unfenced: list[tuple[int, tuple[int, int]]] = []
        self.alive, self.failure = set(), None

    def run(self, partitions: list[tuple[Any, tuple]]) -> None:
        self.alive, self.blocked, self.failure = set(range(len(partitions))), {}, None
        self.unfenced = []
        # held by all but the one whose turn it is
        self.turns = [threading.Lock() for _ in partitions]
        for turn in self.turns:
            turn.acquire()
        threads = [threading.Thread(target=self._partition, args=(i, *p)) for i, p in enumerate(partitions)]
        for thread in threads:
            thread.start()
        self._pass_on()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def _partition(self, number: int, function: Any, args: tuple) -> None:
        self.local.number, self.local.products, self.local.stores = number, deque(), deque()
        try:
            self._await_turn()
            # the grad mode is a thread's own
            with torch.no_grad():
                function(*args)
            assert not self.local.stores, "shared memory is left before it is stored"
        except BaseException as error:
            self._fail(error)
        self.alive.discard(number)
        self._pass_on()

    def _fail(self, error: BaseException) -> None:
        # whoever fails first has the turn: the others are let go on, to end
        if self.failure is None:
            self.failure = error
            for turn in self.turns:
                if turn.locked():
                    turn.release()

    def _await_turn(self) -> None:
        self.turns[self.local.number].acquire()
        if self.failure is not None:
            raise RuntimeError("another partition failed")

    def _pass_on(self) -> None:
        ready = [i for i in sorted(self.alive) if i not in self.blocked or self.blocked[i]()]
        if self.failure is None and ready:
            self.turns[self.draw.choice(ready)].release()
        elif self.failure is None and self.alive:
            self._fail(AssertionError(f"partitions {sorted(self.alive)} wait for each other"))

    def may_switch(self) -> None:
        if self.draw.random() < 0.3:
            self._pass_on()
            self._await_turn()

    def wait(self, ready: Any) -> None:
        while not ready():
            self.blocked[self.local.number] = ready
            self._pass_on()
            self._await_turn()
        self.blocked.pop(self.local.number, None)
        self.may_switch()


scheduler = Scheduler()


class mbarrier:
    class MBarrierLayout:
        pass

    @staticmethod
    def init(bar: Barrier, count: int) -> None:
        bar.count = bar.pending = count

    @staticmethod
    def expect(bar: Barrier, nbytes: int) -> None:
        scheduler.may_switch()
        bar.bytes += nbytes
        bar.pending -= 1
        bar.settle()

    @staticmethod
    def arrive(bar: Barrier, count: int, pred: Any = True) -> None:
        scheduler.may_switch()
        if bool(pred):
            bar.pending -= count
            bar.settle()

    @staticmethod
    def wait(bar: Barrier, parity: Any) -> None:
        # true once the phase of that parity is over; a fresh barrier counts the one before its first as over
        parity = int(parity)
        scheduler.wait(lambda: bar.phase % 2 != parity)


def load_box(source: Descriptor, corner: list[Any], bar: Barrier, into: Shared) -> None:
    scheduler.may_switch()
    part, rows = source.part(corner)
    into.memory.zero_()
    into.memory[:rows] = part
    bar.bytes -= source.block_type.nbytes
    bar.settle()


def fence_async_shared() -> None:
    scheduler.unfenced = [x for x in scheduler.unfenced if x[0] != scheduler.local.number]


def store_box(target: Descriptor, corner: list[Any], source: Shared) -> None:
    source.check_fenced()
    scheduler.local.stores.append((*target.part(corner), source))


class tma:
    @staticmethod
    def store_wait(pending: int) -> None:
        scheduler.may_switch()
        while len(scheduler.local.stores) > pending:
            part, rows, source = scheduler.local.stores.popleft()
            part.copy_(source.memory[:rows])


def warpgroup_mma(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
    for operand in (a, b):
        if isinstance(operand, Shared):
            operand.check_fenced()
    product = Product(a, b, acc, use_acc)
    scheduler.local.products.append(product)
    return product


def warpgroup_mma_wait(pending: int, deps: list[Product]) -> Any:
    scheduler.may_switch()
    queue = scheduler.local.products
    while len(queue) > pending:
        queue.popleft().finish()
    assert all(product.value is not None for product in deps), "a product is used that was not waited for"
    values = [product.value for product in deps]
    return values[0] if len(values) == 1 else values


def allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
    if isinstance(layout, mbarrier.MBarrierLayout):
        return Barriers(shape[0])
    empty = torch.empty(shape, dtype=dtype)
    return Shared(empty.fill_(float("nan")) if dtype.is_floating_point else empty.fill_(-(2**30)))


class Grid:
    program, programs = 0, 1


def where(condition: Any, a: Any, b: Any) -> Block:
    return block(torch.where(torch.as_tensor(condition), torch.as_tensor(a), torch.as_tensor(b)))


LAYOUTS = ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout", "SwizzledSharedLayout")
gl = SimpleNamespace(
    int32=torch.int32,
    int64=torch.int64,
    uint32=UINT32,
    NVMMASharedLayout=language.NVMMASharedLayout,
    float32=torch.float32,
    load=load,
    store=store,
    where=where,
    allocate_shared_memory=allocate,
    static_range=range,
    program_id=lambda axis: block(Grid.program),
    num_programs=lambda axis: block(Grid.programs),
    arange=lambda start, stop, layout: block(torch.arange(start, stop)),
    zeros=lambda shape, dtype, layout: block(torch.zeros(shape, dtype=dtype)),
    full=lambda shape, value, dtype, layout: block(torch.full(shape, value, dtype=dtype)),
    convert_layout=lambda x, layout, assert_trivial=False: x,
    minimum=lambda a, b: block(torch.minimum(torch.as_tensor(a), torch.as_tensor(b))),
    maximum=lambda a, b: block(torch.maximum(torch.as_tensor(a), torch.as_tensor(b))),
    max=lambda x, axis: x.amax(axis),
    sum=lambda x, axis: x.sum(axis),
    exp2=lambda x: torch.exp2(x),
    log2=lambda x: torch.log2(x),
    warp_specialize=lambda partitions, warps, registers: scheduler.run(partitions),
    **{name: lambda *args, **kwargs: None for name in LAYOUTS},
)
REPLACED = dict(
    gl=gl,
    mbarrier=mbarrier,
    load_box=load_box,
    store_box=store_box,
    tma=tma,
    warpgroup_mma=warpgroup_mma,
    warpgroup_mma_wait=warpgroup_mma_wait,
    fence_async_shared=fence_async_shared,
)


def patch(monkeypatch: Any, modules: list[Any]) -> None:
    """Make the kernels of ``modules`` plain Python over the operations here; HopperLaunch.run interprets them."""
    from triton.runtime.jit import JITFunction

    from treegrpo_kernels.triton import hopper_common

    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and value.is_gluon():
                monkeypatch.setattr(module, name, value.fn)
            elif type(value).__name__ == "constexpr":
                monkeypatch.setattr(module, name, value.value)
            elif name in REPLACED:
                monkeypatch.setattr(module, name, REPLACED[name])
    monkeypatch.setattr(hopper_common.HopperLaunch, "run", run)


def run(launch: Any) -> None:
    """One launch, program after program."""
    args = {}
    for name, x in launch.args.items():
        if isinstance(x, torch.Tensor):
            assert x.is_contiguous()
            args[name] = Pointer(x.view(-1))
        else:
            args[name] = Descriptor(x) if hasattr(x, "block_shape") else x
    # the constants are arguments like the others
    kernel = launch.kernel
    (Grid.programs,) = launch.grid
    for program in range(Grid.programs):
        Grid.program = program
        kernel(**args)
