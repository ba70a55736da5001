"""Run the source of a Hopper kernel without a GPU: its roles as threads that a seeded scheduler lets run one at a time.

Triton's interpreter does not know Gluon.  This knows as much of it as our kernels use, on torch tensors, and is stricter
than the device where that shows mistakes:

- what is asynchronous (a TMA copy, a product of a warpgroup, a store of shared memory) happens at a random later time;
- a TMA load spoils its destination when it is issued, and what a product or a store reads must be the same when it is
  issued and when it happens: an overwrite shows whatever the timing;
- an mbarrier knows one phase bit, as on the device, so that a wait that is a lap off passes too early or not at all;
- roles that all wait for each other are a deadlock, told with what each waits for.

Registers, layouts and memory ordering are not modelled.
"""

from __future__ import annotations

import random
import re
import threading
import types
from collections import deque
from functools import partial

import torch

GROUP_THREADS = 128


class Deadlock(AssertionError):
    """Nobody can go on."""


class _Stop(BaseException):
    """Unwinds the threads of a run that has failed."""


class Machine:
    """One SM: roles, barriers, and what is in flight."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        # Some runs have a role that hardly ever gets its turn, or copies that take ages.
        self.weights = [10 ** self.random.uniform(-2, 0) for _ in range(4)]
        self.roles: list[Role] = []
        self.events: list = []  # callables that may happen at any time
        self.named: dict[int, list[Role]] = {}
        self.generation: dict[int, int] = {}
        self.baton = threading.Semaphore(0)
        self.switches = 0

    def run(self, functions) -> None:
        """Run functions to their ends under random interleavings."""
        self.roles = [Role(self, i, *f) for i, f in enumerate(functions)]
        for role in self.roles:
            role.start()
        try:
            while any(role.is_running for role in self.roles) or self.events:
                ready = [r for r in self.roles if r.is_running and r.ready()]
                choices = [(r.proceed, self.weights[r.number]) for r in ready]
                choices += [(r.multiply, self.weights[r.number]) for r in self.roles if r.products]
                choices += [
                    (partial(self.happen, event), self.weights[-1]) for event in self.events
                ]
                if not choices:
                    waits = "; ".join(f"{r.label}: {r.waits}" for r in self.roles if r.is_running)
                    raise Deadlock(f"nobody can go on: {waits}")
                self.switches += 1
                self.random.choices(*zip(*choices, strict=True))[0]()
        finally:
            for role in self.roles:
                role.stop()

    def happen(self, event) -> None:
        """Let something in flight happen."""
        self.events.remove(event)
        event()


class Role(threading.Thread):
    """A warpgroup or the producer warp."""

    def __init__(self, machine, index, function, arguments) -> None:
        super().__init__(daemon=True)
        self.machine = machine
        self.number, self.label = index, f"{function.__name__.strip('_')} {index}"
        self.function, self.arguments = function, arguments
        self.go = threading.Semaphore(0)
        self.is_running = True
        self.stopping = False
        self.failure = None
        self.ready, self.waits = (lambda: True), ""
        self.products: deque = deque()
        self.stores = 0

    def run(self) -> None:
        try:
            self.go.acquire()
            if not self.stopping:
                _here.role = self
                self.function(*self.arguments)
        except _Stop:
            pass
        except BaseException as error:  # handed to the thread that runs the machine
            self.failure = error
        self.is_running = False
        self.machine.baton.release()

    def proceed(self) -> None:
        self.go.release()
        self.machine.baton.acquire()
        if self.failure is not None:
            raise self.failure

    def multiply(self) -> None:
        """Let the oldest product in flight happen."""
        self.products.popleft()()

    def stop(self) -> None:
        if self.is_running:
            self.stopping = True
            self.go.release()
            self.machine.baton.acquire()
        self.join()

    def pause(self, ready=lambda: True, waits="") -> None:
        """Hand over; go on at some time when `ready`."""
        self.ready, self.waits = ready, waits
        self.machine.baton.release()
        self.go.acquire()
        if self.stopping:
            raise _Stop
        self.ready, self.waits = (lambda: True), ""


_here = threading.local()


# -- shared memory, global memory, barriers ------------------------------------------------------------------------


class Shared:
    """A shared memory descriptor over a torch view."""

    def __init__(self, data, label="") -> None:
        self.data, self.label = data, label
        self.dtype = data.dtype
        self.parts: dict[int, Shared] = {}
        self.barrier = None

    def index(self, i):
        i = int(i)
        if i not in self.parts:
            self.parts[i] = Shared(self.data[i], f"{self.label}[{i}]")
        return self.parts[i]

    def reshape(self, shape):
        return Shared(self.data.view(shape), self.label)

    def permute(self, order):
        return Shared(self.data.permute(order), self.label)

    def slice(self, start, length):
        return Shared(self.data[start : start + length], self.label)

    def load(self, layout=None):
        _here.role.pause()
        return self.data.clone()

    def store(self, value):
        _here.role.pause()
        self.data.copy_(value)


class Barrier:
    """An mbarrier: arrivals and bytes that its phase still lacks."""

    def __init__(self, count, label) -> None:
        self.count, self.label = count, label
        self.pending, self.bytes, self.phase = count, 0, 0

    def arrive(self, count, expect=0) -> None:
        self.bytes += expect
        self.pending -= count
        assert self.pending >= 0, f"{self.label}: more arrivals than its {self.count}"
        self.complete()

    def land(self, count) -> None:
        self.bytes -= count
        self.complete()

    def complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.count, self.phase + 1


class Pointer:
    """Into a tensor in global memory."""

    def __init__(self, data, offset=0) -> None:
        self.data, self.offset = data, offset

    def __add__(self, offset):
        return Pointer(self.data, self.offset + offset)

    def at(self, mask):
        where = torch.as_tensor(self.offset)
        if mask is not None:
            where = torch.where(torch.as_tensor(mask), where, 0)
        assert ((where >= 0) & (where < self.data.numel())).all(), "outside its tensor"
        return where.long()


class Descriptor:
    """TMA over a `[B, H, S, D]` view; what lies outside reads as zeros and is not written."""

    def __init__(self, data, rows, width) -> None:
        self.data, self.box = data, (rows, width)
        self.dtype, self.layout = data.dtype, None
        self.block_type = types.SimpleNamespace(nbytes=rows * width * data.element_size())

    def read(self, place):
        b, h, start, _ = map(int, place)
        assert 0 <= b < len(self.data), "no such sample"
        assert 0 <= h < self.data.shape[1], "no such head"
        part = self.data[b, h, max(start, 0) : start + self.box[0]]
        full = part.new_zeros(self.box)
        full[: len(part), : part.shape[1]] = part
        return full

    def write(self, place, value) -> None:
        b, h, start, _ = map(int, place)
        part = self.data[b, h, start : start + self.box[0]]
        part.copy_(value.view(self.box)[: len(part), : part.shape[1]])


# -- the language --------------------------------------------------------------------------------------------------


def _spoilt(dtype):
    return float("nan") if dtype.is_floating_point else -7


def _same(x, y) -> bool:
    return torch.equal(x.nan_to_num(nan=12345.0), y.nan_to_num(nan=12345.0))


class mbarrier:
    @staticmethod
    def MBarrierLayout():
        return "barrier"

    @staticmethod
    def init(smem, count):
        smem.barrier = Barrier(count, smem.label)

    @staticmethod
    def wait(smem, phase):
        barrier, phase = smem.barrier, int(phase)
        assert phase in (0, 1)
        _here.role.pause(
            lambda: barrier.phase % 2 != phase,
            f"{barrier.label} phase {phase} (at {barrier.phase}, lacks {barrier.pending})",
        )

    @staticmethod
    def arrive(smem, count=1):
        role = _here.role
        role.pause()
        smem.barrier.arrive(count)

    @staticmethod
    def expect(smem, count):
        _here.role.pause()
        smem.barrier.arrive(1, expect=count)


class tma:
    @staticmethod
    def async_copy_global_to_shared(descriptor, place, smem, target):
        _here.role.pause()
        target.data.fill_(_spoilt(target.dtype))
        barrier = smem.barrier

        def land():
            target.data.copy_(descriptor.read(place).view(target.data.shape))
            barrier.land(descriptor.block_type.nbytes)

        _here.role.machine.events.append(land)

    @staticmethod
    def async_copy_shared_to_global(descriptor, place, source):
        role = _here.role
        role.pause()
        before = source.data.clone()
        role.stores += 1

        def land():
            assert _same(before, source.data), f"{source.label} overwritten before it was stored"
            descriptor.write(place, before)
            role.stores -= 1

        role.machine.events.append(land)

    @staticmethod
    def store_wait(pending):
        role = _here.role
        role.pause(lambda: role.stores <= pending, "stores")


class _Product:
    result = None


def warpgroup_mma(a, b, accumulator, use_acc=True, is_async=False):
    """Happens later, in the order of the warpgroup's products."""
    assert is_async
    role, product = _here.role, _Product()
    role.pause()
    a, shared = (a.data.clone(), a) if isinstance(a, Shared) else (a, None)
    before = b.data.clone()

    def land():
        assert _same(before, b.data), f"{b.label} overwritten under a product"
        assert shared is None or _same(a, shared.data), (
            f"{shared.label} overwritten under a product"
        )
        product.result = a.float() @ before.float()
        if use_acc:
            # One that is in flight itself comes earlier in this row of products.
            before_it = accumulator.result if isinstance(accumulator, _Product) else accumulator
            product.result = before_it + product.result

    role.products.append(land)
    return product


def warpgroup_mma_wait(pending, deps):
    """Wait until at most that many products are in flight; the result of one that has happened."""
    role = _here.role
    role.pause(lambda: len(role.products) <= pending, "products")
    results = tuple(product.result for product in deps)
    assert all(result is not None for result in results), "a product is still in flight"
    return results[0] if len(results) == 1 else results


def assembly(code, on=1):
    """Named barriers; two warpgroups make one complete."""
    found = re.search(r"bar\.(sync|arrive) (\d+), 256", code)
    if found is None:
        return  # declares a register
    role, number = _here.role, int(found[2])
    role.pause()
    if not int(on):
        return
    machine = role.machine
    arrived = machine.named.setdefault(number, [])
    assert role not in arrived, f"{role.label} came twice to named barrier {number}"
    arrived.append(role)
    generation = machine.generation.setdefault(number, 0)
    if len(arrived) * GROUP_THREADS == 256:
        machine.named[number] = []
        machine.generation[number] += 1
    if found[1] == "sync":
        role.pause(lambda: machine.generation[number] > generation, f"named barrier {number}")


def _times_rows(b_x, b_alpha):
    return b_x * b_alpha[:, None]


def _tensor(x):
    return torch.as_tensor(x)


def _load(pointer, mask=None, other=0):
    values = pointer.data[pointer.at(mask)]
    return values if mask is None else torch.where(_tensor(mask), values, other)


def _store(pointer, value, mask=None):
    where, value = pointer.at(mask), _tensor(value).to(pointer.data.dtype)
    value = value.expand(where.shape)
    keep = slice(None) if mask is None else _tensor(mask).expand(where.shape)
    pointer.data[where[keep]] = value[keep]


def _atomic_add(pointer, value, mask=None, sem=None):
    where = pointer.at(mask)
    old = pointer.data[where].clone()
    if mask is not None:
        where, value = where[mask], value[mask]
    assert where.dim() == 0 or len(where.unique()) == len(where), "one address twice in a call"
    pointer.data[where] += value
    return old


def _language(program: int, programs: int, machine: Machine) -> types.SimpleNamespace:
    """What `gl` is for one program."""

    def layout(*_, **__):
        return None

    def warp_specialize(roles, *_):
        machine.run(roles)

    return types.SimpleNamespace(
        **{n: getattr(torch, n) for n in ("int32", "int64", "float32", "log")},
        exp2=lambda x: torch.exp2(_tensor(x)),
        **dict.fromkeys(
            ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout", "SwizzledSharedLayout"),
            layout,
        ),
        constexpr=object,
        load=_load,
        store=_store,
        atomic_add=_atomic_add,
        zeros=lambda shape, dtype, _=None: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, _=None: torch.full(shape, value.item() if isinstance(value, torch.Tensor) else value, dtype=dtype),
        arange=lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32),
        where=lambda c, x, y: torch.where(_tensor(c), _tensor(x), _tensor(y)),
        maximum=lambda x, y: torch.maximum(*torch.broadcast_tensors(_tensor(x), _tensor(y))),
        minimum=lambda x, y: torch.minimum(*torch.broadcast_tensors(_tensor(x), _tensor(y))),
        max=lambda x, axis: x.amax(axis),
        sum=lambda x, axis: x.sum(axis),
        convert_layout=lambda x, _: x,
        to_tensor=_tensor,
        static_range=range,
        program_id=lambda _: _tensor(program),
        num_programs=lambda _: programs,
        allocate_shared_memory=lambda dtype, shape, _: Shared(
            torch.full(shape, _spoilt(dtype), dtype=dtype), f"smem {shape}"
        ),
        warp_specialize=warp_specialize,
    )  # fmt: skip


def run_kernel(kernel, programs: int, seed: int, *arguments, replace=None, **constants) -> int:
    """Run a Gluon kernel's programs one after the other; the number of steps of the scheduler.

    `replace` puts other functions, which see the names of this module, in the place of device functions: a mistake must
    be found.
    """
    switches = 0
    for program in range(programs):
        machine = Machine(seed + program)
        emulate = _Emulation(_language(program, programs, machine), replace or {})
        emulate(kernel)(*arguments, **constants, num_warps=4)
        switches += machine.switches
    return switches


class _Emulation:
    """Functions of the kernels with the language exchanged under them."""

    def __init__(self, language, replace) -> None:
        self.language, self.replace = language, replace
        self.known: dict[int, object] = {}

    def __call__(self, kernel):
        function = kernel.fn
        if id(function) not in self.known:
            names = {}
            clone = types.FunctionType(function.__code__, names, function.__name__)
            self.known[id(function)] = clone
            names.update(self.translated(function.__globals__))
        return self.known[id(function)]

    def translated(self, names):
        own = {
            "gl": self.language,
            "mbarrier": mbarrier,
            "tma": tma,
            "warpgroup_mma": warpgroup_mma,
            "warpgroup_mma_wait": warpgroup_mma_wait,
            "fence_async_shared": lambda: None,
            "assembly": assembly,
            "rescale": _times_rows,
            "times_rows": _times_rows,
            "pack_pairs": lambda b_p, dtype: b_p.to(dtype),
            "thread_maxima": lambda b_p: b_p.view(64, -1, 4, 2).amax((1, 3)),
            "are_beyond": lambda b_parts, *_: int((b_parts > 4096).any()),
            "log2": torch.log2,
            "_turn": lambda on, code: assembly(code, on),
            "__builtins__": __builtins__,
            **self.replace,
        }
        for name, value in names.items():
            if name in own:
                continue
            if hasattr(value, "fn") and hasattr(value, "arg_names"):
                own[name] = self(value)
            elif type(value).__name__ == "constexpr":
                own[name] = value.value
        return own
