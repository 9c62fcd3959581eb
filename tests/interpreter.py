"""Triton's interpreter, with which kernels run on a CPU, as it is but quicker."""

import dataclasses
import inspect
from functools import wraps


class _Inspect:
    """``inspect``, which knows the builtins of Triton's language.

    The interpreter looks through all members of the language for them in each launch of a kernel.
    """

    def __init__(self, names):
        self._names = names

    def __getattr__(self, name):
        return getattr(inspect, name)

    def getmembers(self, of):
        """Name and value of the members of an object; of the language, of its builtins alone."""
        if of not in self._names:
            return inspect.getmembers(of)
        return [(name, getattr(of, name)) for name in self._names[of]]


def quicken():
    """Let the interpreter do nothing twice and nothing that it throws away; what kernels compute stays as it is.

    To be called while no builtin of the language is replaced.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patched = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor, tl.core.tensor_descriptor_base)
    interpreter.inspect = _Inspect(
        {of: [name for name, member in inspect.getmembers(of) if tl.core.is_builtin(member)] for of in patched}
    )
    _patch_once_in_a_launch(interpreter)
    _remember_types(interpreter)
    _remember_shapes(tl.core)
    _leave_equal_shapes(interpreter.TritonSemantic)
    _leave_out_what_nobody_reads(interpreter.interpreter_builder)


def _patch_once_in_a_launch(interpreter):
    """In each call of a function by a kernel the language is replaced once more."""
    plain, languages = interpreter._patch_lang, (interpreter.tl, interpreter.tl.core)
    visible, replaced = {}, set()

    class Scope(interpreter._LangPatchScope):
        """Of what the launch has replaced."""

        def restore(self):
            replaced.clear()
            super().restore()

    @wraps(plain)
    def patch(function):
        if function not in visible:
            visible[function] = {
                at for at, of in enumerate(languages) if any(one is of for one in function.__globals__.values())
            }
        if replaced and visible[function] <= replaced:
            return Scope()
        scope = plain(function)
        scope.__class__ = Scope
        replaced.update(visible[function])
        return scope

    interpreter._patch_lang = patch


def _remember_types(interpreter):
    """For each result a table of all types is built to look one up."""
    plain, known = interpreter._get_np_dtype, {}

    @wraps(plain)
    def get_np_dtype(of):
        name = of.scalar.name
        if name not in known:
            known[name] = plain(of)
        return known[name]

    interpreter._get_np_dtype = get_np_dtype


def _remember_shapes(core):
    """For each result its shape is checked, and its sizes are wrapped one by one."""
    plain_type, plain_tensor, types, tensors = core.block_type.__init__, core.tensor.__init__, {}, {}

    @wraps(plain_type)
    def make_type(self, element_ty, shape):
        sizes = tuple(shape)
        if not all(type(size) is int for size in sizes):
            return plain_type(self, element_ty, shape)
        key = (element_ty.name, sizes)
        if key not in types:
            plain_type(self, element_ty, shape)
            types[key] = {name: value for name, value in vars(self).items() if name != "element_ty"}
        self.__dict__.update(types[key], element_ty=element_ty)

    @wraps(plain_tensor)
    def make_tensor(self, handle, type):
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in tensors:
            plain_tensor(self, handle, type)
            tensors[shape] = {"shape": self.shape, "numel": self.numel}
        self.__dict__.update(tensors[shape], handle=handle, type=type, dtype=type.scalar)

    core.block_type.__init__, core.tensor.__init__ = make_type, make_tensor


def _leave_equal_shapes(semantic):
    """Two of the same shape are compared size by size, to be left as they are."""
    plain = semantic.broadcast_impl_value

    @wraps(plain)
    def broadcast(self, lhs, rhs):
        if lhs.shape is rhs.shape:
            return lhs, rhs
        return plain(self, lhs, rhs)

    semantic.broadcast_impl_value = broadcast


def _leave_out_what_nobody_reads(builder):
    """Whether integers overflow is computed for each sum, then asserted only with the option ``debug``."""
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
