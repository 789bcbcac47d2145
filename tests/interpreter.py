"""Triton's interpreter, faster for the same results: what it works out anew at every operation is kept here.

Most of its time goes into types: every value carries its shape as a tuple whose type has a name, and all of
triton.language is replaced at every call of a device function. Its check of integer overflow, which does five
operations for each and then asserts nothing, is made in one, and does.
"""

import operator
from typing import Any

import numpy as np
from triton import language
from triton.runtime import interpreter

core = language.core


def speed_up() -> None:
    """Once a process, before kernels run."""
    interpreter._patch_lang = _patch_once(interpreter._patch_lang)
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    core._type_for_tuple_values = _of_sizes(core._type_for_tuple_values)
    core.block_type.__init__ = _block_type_once(core.block_type.__init__)
    core.tensor.__init__ = _shape_once(core.tensor.__init__)
    language.semantic.TritonSemantic.binary_op_sanitize_overflow_impl = _no_overflow


def _patch_once(patch: Any) -> Any:
    """What a launch has replaced already is left as it is."""

    def patch_new(function):
        names = [x for x in function.__globals__.values() if x is language or x is core]
        if names and not any(core.is_builtin(x.load) for x in names):
            return interpreter._LangPatchScope()
        return patch(function)

    return patch_new


def _by_name(numpy_type: Any) -> Any:
    known = {}

    def of(dtype):
        if isinstance(dtype, core.block_type):
            dtype = dtype.element_ty
        if dtype.name not in known:
            known[dtype.name] = numpy_type(dtype)
        return known[dtype.name]

    return of


def _of_sizes(type_for: Any) -> Any:
    known = {}

    def of(values, fields=None):
        sizes = tuple(x.value if type(x) is core.constexpr else x for x in values)
        if fields is not None or any(type(x) is not int for x in sizes):
            return type_for(values, fields)
        if sizes not in known:
            known[sizes] = type_for(values)
        return known[sizes]

    return of


def _block_type_once(make: Any) -> Any:
    known = {}

    def __init__(self, element_ty, shape):
        key = element_ty.name, *(x.value if type(x) is core.constexpr else x for x in shape)
        if key not in known:
            make(self, element_ty, shape)
            known[key] = dict(vars(self))
        else:
            vars(self).update(known[key])

    return __init__


def _shape_once(make: Any) -> Any:
    known = {}

    def __init__(self, handle, type):
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in known:
            make(self, handle, type)
            known[key] = dict(shape=self.shape, numel=self.numel)
        vars(self).update(known[key], handle=handle, type=type, dtype=type.scalar)

    return __init__


def _no_overflow(semantic: Any, a: Any, b: Any, operation: Any) -> None:
    scalar = a.type.scalar
    if scalar.int_bitwidth < 64:
        wide = [x.handle.data.astype(np.int64) for x in (a, b)]
        exact = getattr(operator, operation.__name__)(*wide)
        assert (exact >= scalar.get_int_min_value()).all() and (exact <= scalar.get_int_max_value()).all(), (
            f"{scalar} overflows in {operation.__name__}"
        )
