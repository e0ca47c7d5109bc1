"""An exported torch program through torch-mlir: as text of three dialects, and as machine code that runs here.

torch-mlir is an optional extra, imported when something is lowered. It brings its own MLIR: the passes and the
execution engine below are those of its bindings.
"""

from __future__ import annotations

import ctypes
import warnings
import weakref
from collections.abc import Sequence
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from anabranch.compiler.mlir_bindings import bindings
from anabranch.dsl.diagnostics import Diagnostic, PlanError

Dialect: TypeAlias = Literal["torch", "linalg", "stablehlo"]

FUNCTION: Final = "main"

TO_TORCH: Final = (
    "func.func(torch-match-quantized-custom-ops)",
    "torchdynamo-export-to-torch-backend-pipeline{extra-library=}",
)
TO_LINALG: Final = ("torch-backend-to-linalg-on-tensors-backend-pipeline{allow-non-finites=true}",)
TO_STABLEHLO: Final = ("torch-backend-to-stablehlo-backend-pipeline{allow-non-finites=true}",)

REORDER: Final = """
module attributes {transform.with_named_sequence} {
  transform.named_sequence @__transform_main(%module: !transform.any_op) {
    %products = transform.structured.match ops{["linalg.matmul"]} in %module : (!transform.any_op) -> !transform.any_op
    %plain = transform.structured.generalize %products : (!transform.any_op) -> !transform.any_op
    %done = transform.structured.interchange %plain iterator_interchange = [0, 2, 1]
      : (!transform.any_op) -> !transform.any_op
    transform.yield
  }
}
"""
"""A product goes along a row of its right operand in the innermost loop, where it would go down a column."""

OUTLINE: Final = """
module attributes {transform.with_named_sequence} {
  transform.named_sequence @__transform_main(%module: !transform.any_op) {
    %loops = transform.structured.match ops{["scf.for"]} attributes {outermost} in %module
      : (!transform.any_op) -> !transform.any_op
    transform.foreach %loops : !transform.any_op {
    ^bb0(%loop: !transform.any_op):
      %function, %call = transform.loop.outline %loop {func_name = "loop"}
        : (!transform.any_op) -> (!transform.any_op, !transform.op<"func.call">)
    }
    transform.yield
  }
}
"""
"""Every outermost loop becomes a function: LLVM's time grows with the square of a function's loops."""

TO_LOOPS: Final = (
    # Scatter is torch-mlir's own operation, which one-shot bufferisation does not know. This copies what is written to.
    "func.func(tm-tensor-bufferize)",
    # Tensors become buffers, in functions too. Arguments are never written: a copy is made before any write.
    "one-shot-bufferize{bufferize-function-boundaries copy-before-write "
    "function-boundary-type-conversion=identity-layout-map}",
    "func.func(tm-tensor-to-loops)",
    # Every buffer is freed when it is last used, but those that are returned: the caller owns these.
    "buffer-deallocation-pipeline",
    "convert-bufferization-to-memref",
    # A copy into part of a buffer is a loop too, and not a call of a run-time library.
    "func.func(refback-munge-memref-copy)",
    "func.func(convert-linalg-to-loops)",
)
"""From linalg on tensors to loops over buffers."""

TO_LLVM: Final = (
    "func.func(lower-affine)",
    "canonicalize",
    "cse",
    # Views with strides become arithmetic on indices, which is affine again.
    "expand-strided-metadata",
    "func.func(lower-affine)",
    "convert-scf-to-cf",
    "func.func(convert-math-to-llvm)",
    # What LLVM has no instruction for is a call of the C library.
    "convert-math-to-libm",
    "finalize-memref-to-llvm",
    "convert-arith-to-llvm",
    "convert-func-to-llvm",
    "convert-cf-to-llvm",
    "convert-index-to-llvm",
    "reconcile-unrealized-casts",
)
"""From loops over buffers to the LLVM dialect."""

_DTYPES: Final = (torch.float32, torch.float64, torch.int64, torch.int32, torch.bool)


def mlir_text(step: ExportedProgram, dialect: Dialect) -> str:
    """The program in a dialect of MLIR, large constants left out.

    Raises PlanError `no-mlir` without torch-mlir, and `not-lowered` naming what has no lowering to the dialect.
    """
    return str(_lowered(step, dialect).operation.get_asm(large_elements_limit=16, large_resource_limit=64))


def jit(step: ExportedProgram, *, opt_level: int = 0) -> JitStep:
    """Compile the program to machine code of this processor: torch to linalg, to loops, to LLVM.

    step: its inputs and outputs are tensors, in any nesting, on the CPU, of fp32, fp64, int64, int32 or bool; weights
        that are parameters of its module become constants of the code, so large ones are better given as inputs
    opt_level: LLVM's, 0 to 3: a higher one compiles longer, to faster code
    Raises PlanError as `mlir_text` does, and ValueError for another dtype.
    """
    return JitStep(step, opt_level)


class JitStep:
    """A program in machine code, called as the program's module is. Its inputs are only read."""

    def __init__(self, step: ExportedProgram, opt_level: int) -> None:
        self._inputs = _tensors(step, "input")
        self._outputs = _tensors(step, "output")
        self._in_spec, self._out_spec = step.call_spec.in_spec, step.call_spec.out_spec
        module = _lowered(step, "linalg")
        _transform(module, REORDER)
        _run(module, TO_LOOPS, "loops")
        _outline(module)
        _run(module, TO_LLVM, "LLVM")
        self._engine = bindings("execution_engine").ExecutionEngine(module, opt_level=opt_level)
        self._call = self._engine.lookup(FUNCTION)

    def __call__(self, *args: Any) -> Any:
        """Raises ValueError where `args` differ from the program's inputs in nesting, dtype, device or size."""
        tensors, spec = pytree.tree_flatten((args, {}))
        if spec != self._in_spec:
            raise ValueError(f"the program's inputs are nested as {self._in_spec}, not as {spec}")
        _check(self._inputs, tensors)
        # Buffers of MLIR's plain layout are contiguous.
        tensors = [x.detach().contiguous() for x in tensors]
        descriptors = [_descriptor(x) for x in tensors]
        found = (ctypes.c_int64 * sum(3 + 2 * x.dim() for x in self._outputs))()
        pointers = [ctypes.pointer(x) for x in (found, *descriptors)]
        # Each argument is passed by a pointer to it, and each is itself a pointer to a descriptor.
        packed = (ctypes.c_void_p * len(pointers))(*(ctypes.addressof(pointer) for pointer in pointers))
        self._call(packed)
        return pytree.tree_unflatten(_taken(list(found), self._outputs), self._out_spec)


def _outline(module: Any) -> None:
    """Make functions of the outermost loops of the program's function, equal ones once: layers are alike."""
    ir = bindings("ir")
    [main] = [op for op in module.body if _symbol(op) == FUNCTION]
    with module.context:
        main.attributes["llvm.emit_c_interface"] = ir.UnitAttr.get()
        # What is left there are calls, allocations and sizes, by the thousand: nothing that is worth LLVM's time.
        main.attributes["passthrough"] = ir.ArrayAttr.get([ir.StringAttr.get(x) for x in ("noinline", "optnone")])
        for op in main.regions[0].blocks[0]:
            if op.operation.name == "scf.for":
                op.operation.attributes["outermost"] = ir.UnitAttr.get()
    _transform(module, OUTLINE)
    first: dict[str, str] = {}
    same: dict[str, str] = {}
    for op in list(module.body):
        name = _symbol(op)
        if not name.startswith("loop"):
            continue
        text = op.operation.get_asm(use_local_scope=True).replace(f"@{name}(", "@loop(", 1)
        same[name] = first.setdefault(text, name)
        with module.context:
            op.attributes["passthrough"] = ir.ArrayAttr.get([ir.StringAttr.get("noinline")])
        if same[name] != name:
            op.operation.erase()

    def redirect(op: Any) -> Any:
        if op.name == "func.call":
            called = op.attributes["callee"].value
            op.attributes["callee"] = ir.FlatSymbolRefAttr.get(same.get(called, called), op.context)
        return ir.WalkResult.ADVANCE

    main.operation.walk(redirect)


def _symbol(op: Any) -> str:
    """The name of a function; empty for what has none."""
    return str(op.attributes["sym_name"].value) if "sym_name" in op.attributes else ""


def _transform(module: Any, script: str) -> None:
    """Run a script of the transform dialect on the module."""
    ir, interpreter = bindings("ir"), bindings("dialects.transform.interpreter")
    with module.context, ir.Location.unknown():
        parsed = ir.Module.parse(script)
        [sequence] = parsed.body
        interpreter.apply_named_sequence(module.operation, sequence.operation, parsed.operation)


def _lowered(step: ExportedProgram, dialect: Dialect) -> Any:
    """The program as a module of torch-mlir's."""
    fx = bindings("fx")
    with warnings.catch_warnings():
        # torch-mlir copies torch's trees of arguments in a way that torch is about to change.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec")
        try:
            module = fx.export_and_import(step, output_type="raw", func_name=FUNCTION)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise _not_lowered(f"torch-mlir cannot read the program: {error}", "torch") from None
    _refuse_opaque(module)
    _run(module, TO_TORCH, "torch")
    match dialect:
        case "torch":
            pass
        case "linalg":
            _run(module, TO_LINALG, dialect)
        case "stablehlo":
            _run(module, TO_STABLEHLO, dialect)
    return module


def _refuse_opaque(module: Any) -> None:
    """Operations that are not torch's own have no lowering."""
    found: list[str] = []

    def visit(op: Any) -> Any:
        if op.name == "torch.operator":
            found.append(str(op.attributes["name"]).strip('"').removeprefix("torch."))
        return bindings("ir").WalkResult.ADVANCE

    module.operation.walk(visit)
    if found:
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(found))
        raise _not_lowered(f"torch-mlir knows no {names}", "torch")


def _run(module: Any, passes: Sequence[str], dialect: str) -> None:
    """Run the passes in place."""
    said: list[str] = []

    def note(diagnostic: Any) -> bool:
        said.append(str(diagnostic.message))
        return True

    context = module.context
    manager = bindings("passmanager").PassManager
    handler = context.attach_diagnostic_handler(note)
    try:
        with context:
            for name in passes:
                try:
                    manager.parse(f"builtin.module({name})").run(module.operation)
                except Exception as error:
                    reason = said[0] if said else str(error)
                    raise _not_lowered(f"torch-mlir's pass `{name}` failed: {reason}", dialect) from None
    finally:
        handler.detach()


def _not_lowered(what: str, dialect: str) -> PlanError:
    return PlanError(
        Diagnostic("not-lowered", f"the program does not lower to {dialect}: {what}", help="see docs/mlir.md")
    )


def _tensors(step: ExportedProgram, side: Literal["input", "output"]) -> list[Tensor]:
    """What the program takes or gives, as tensors without data whose sizes may be symbols."""
    values = {node.name: node.meta.get("val") for node in step.graph.nodes}
    if side == "input":
        names = [spec.arg.name for spec in step.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    else:
        names = [spec.arg.name for spec in step.graph_signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    found = [values.get(name) for name in names]
    for name, value in zip(names, found, strict=True):
        if not isinstance(value, Tensor) or value.dtype not in _DTYPES:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the program's {side} `{name}` is of {kind}, and it must be a tensor of one of {_DTYPES}")
    return [value for value in found if isinstance(value, Tensor)]


def _check(expected: Sequence[Tensor], given: Sequence[Any]) -> None:
    sizes: dict[Any, int] = {}
    for place, (wanted, x) in enumerate(zip(expected, given, strict=True)):
        if not isinstance(x, Tensor) or x.device.type != "cpu" or x.dtype != wanted.dtype or x.dim() != wanted.dim():
            what = f"{x.dtype} of {x.dim()} dimensions on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"input {place} must be a tensor of {wanted.dtype}, {wanted.dim()} dimensions, not {what}")
        for dim, (want, size) in enumerate(zip(wanted.shape, x.shape, strict=True)):
            # A size that is a symbol takes its value from the first input that has it.
            known = want if type(want) is int else sizes.setdefault(str(want), size)
            if known != size:
                raise ValueError(f"input {place} has size {size} in dimension {dim}, and it must be {known}")


def _descriptor(x: Tensor) -> Any:
    """MLIR's description of a buffer: where it was allocated, where it begins, offset, sizes and strides."""
    return (ctypes.c_int64 * (3 + 2 * x.dim()))(x.data_ptr(), x.data_ptr(), 0, *x.shape, *x.stride())


class _Owner:
    """Frees a buffer that machine code allocated, when nothing refers to this any more."""

    def __init__(self, address: int) -> None:
        free = ctypes.CDLL(None).free
        weakref.finalize(self, free, ctypes.c_void_p(address)).atexit = False


def _taken(found: list[int], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The returned buffers as tensors, each freed with the last tensor that reads it."""
    owners: dict[int, _Owner] = {}
    tensors: list[Tensor] = []
    for output in outputs:
        rank = output.dim()
        (allocated, aligned, offset, *shape), found = found[: 3 + rank], found[3 + 2 * rank :]
        count = 1
        for size in shape:
            count *= size
        is_shared = allocated in owners
        if not is_shared:
            owners[allocated] = _Owner(allocated)
        if count == 0:
            tensors.append(torch.empty(shape, dtype=output.dtype))
            continue
        begin = aligned + offset * output.dtype.itemsize
        memory = (ctypes.c_char * (count * output.dtype.itemsize)).from_address(begin)
        setattr(memory, "owner", owners[allocated])  # noqa: B010  (no type checker knows that it can have attributes)
        tensor = torch.frombuffer(memory, dtype=output.dtype).reshape(shape)
        # Equal results are computed once, and are tensors of their own all the same.
        tensors.append(tensor.clone() if is_shared else tensor)
    return tensors
