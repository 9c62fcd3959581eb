"""Triton's interpreter, with which kernels run on a CPU, as it is but quicker."""

import inspect


class _Inspect:
    """``inspect``, which knows the builtins of Triton's language.

    The interpreter looks through all members of the language for them in each call of each function of a kernel, which
    takes a third of the time of small kernels.
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


def look_for_builtins_once():
    """Let the interpreter look for builtins now, while none is replaced, and never again."""
    import triton.language as tl
    from triton.runtime import interpreter

    patched = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor, tl.core.tensor_descriptor_base)
    interpreter.inspect = _Inspect(
        {of: [name for name, member in inspect.getmembers(of) if tl.core.is_builtin(member)] for of in patched}
    )
