"""flash-linear-attention's kernels in Triton's interpreter, for float32 tests on a CPU: ``interpret()`` before its ops
are imported. Its package stays as it is; what the interpreter lacks is put around it.
"""

from typing import Any

from interpreter import speed_up
from triton.runtime import autotuner, interpreter


class _Index(int):
    """A loop's index: compiled kernels may convert it, Python's own ints have no ``to``."""

    def to(self, dtype: Any) -> Any:
        return interpreter.interpreter_semantic.scalar_constant(int(self), dtype)


def _kernel_range(*limits: Any) -> list[_Index]:
    return [_Index(i) for i in range(*map(int, limits))]


def interpret() -> None:
    """Once a process."""
    compile_and_exec = interpreter.FunctionRewriter._compile_and_exec

    def compile_with_range(self: Any, tree: Any) -> Any:
        if self.fn.__module__.split(".")[0] == "fla":
            self.fn.__globals__["range"] = _kernel_range
        return compile_and_exec(self, tree)

    interpreter.FunctionRewriter._compile_and_exec = compile_with_range
    speed_up()
    autotuner.Autotuner.run = _run_first
    import fla.ops.utils.cache

    fla.ops.utils.cache.CachedAutotuner.run = _run_first


def _run_first(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The first configuration that may run, nothing timed."""
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    configs = self.configs
    if self.early_config_prune:
        configs = self.early_config_prune(configs, self.nargs, **kwargs) or configs
    self.best_config = configs[0]
    if configs[0].pre_hook is not None:
        configs[0].pre_hook({**self.nargs, **kwargs, **configs[0].all_kwargs()})
    try:
        return self.fn.run(*args, **kwargs, **configs[0].all_kwargs())
    finally:
        self.nargs = None
