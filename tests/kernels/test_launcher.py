"""Launching again what was launched before: the same binary, the new arguments; another form, another binary."""

import pytest
import torch

from sparsediff.kernels import launcher


class Kernel:
    """Stands in for a `@triton.jit` function: remembers how it was called."""

    arg_names = ("x_ptr", "y_ptr", "size", "FLAG", "BLOCK")

    def __init__(self):
        self.compiled, self.launches = [], []

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, **constants):
            self.compiled.append(constants)
            self.launches.append((grid, arguments))
            return Binary(self)

        return compile_and_launch


class Binary:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launches.append((grid, arguments))


@pytest.fixture(autouse=True)
def no_binaries(monkeypatch):
    monkeypatch.setattr(launcher, "_binaries", {})


def launch(kernel, form, *arguments, grid=(7,), block=64):
    launcher.launch_kernel(kernel, grid, form, arguments, BLOCK=block, FLAG=True, num_warps=4)


def test_the_second_call_of_a_form_skips_the_binding():
    kernel = Kernel()
    launch(kernel, "a", 1, 2, 3)
    launch(kernel, "a", 4, 5, 6, grid=(8, 2))
    assert len(kernel.compiled) == 1
    assert kernel.launches[0] == ((7,), (1, 2, 3))
    # A binary takes three grid dimensions, and its compile-time arguments in the kernel's own order.
    assert kernel.launches[1] == ((8, 2, 1), (4, 5, 6, True, 64))


def test_forms_and_kernels_have_binaries_of_their_own():
    first, second = Kernel(), Kernel()
    for kernel in (first, second):
        for form in ("a", "b", "a"):
            launch(kernel, form, 1, 2, 3)
    assert len(first.compiled) == len(second.compiled) == 2


def test_the_interpreter_has_no_binaries():
    class Interpreted(Kernel):
        def __getitem__(self, grid):
            return lambda *arguments, **constants: self.launches.append((grid, arguments))

    kernel = Interpreted()
    for _ in range(2):
        launch(kernel, "a", 1, 2, 3)
    assert kernel.launches == [((7,), (1, 2, 3))] * 2


def test_forms_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(launcher, "MAX_BINARIES", 4)
    kernel = Kernel()
    for form in range(20):
        launch(kernel, form, 1, 2, 3)
        assert len(launcher._binaries) <= 4


def test_alignment_is_part_of_a_form():
    x = torch.zeros(64)
    assert launcher.aligned(x, x[1:], x[4:]) == 0b101
