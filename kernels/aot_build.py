"""One configuration, compiled for one target, and what its machine code says."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from anabranch.kernels.shipped import Config, Matrix


@dataclass(frozen=True, slots=True)
class Target:
    """A chip that kernels are built for.

    backend, arch, warp_size: as Triton names the chip
    shared_bytes: the most shared memory of one block (CUDA programming guide, compute capabilities; CDNA 3 ISA, LDS)
    matrix: the classes of matrix instruction, one of which each kind of tile must have
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    matrix: Mapping[Matrix, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Built:
    """One configuration in one target's machine code.

    registers: of one thread; AMD: vector registers
    spills: instructions that move a thread's registers to or from its own memory; AMD: vector registers so moved
    scalar_spills: AMD: scalar registers that are kept in lanes of vector registers. That is no memory (else there would
        be `stack_bytes`) and no problem: masks of loads are pairs of scalar registers, of which there are 106
    stack_bytes: a thread's own memory
    tensor_memory: columns of sm_100's memory for matrix products
    matrix: the matrix instructions' class, several joined by "+", or "none"
    binary: cubin or hsaco; None where the figures were kept from an earlier build
    """

    registers: int
    spills: int
    scalar_spills: int
    stack_bytes: int
    shared_bytes: int
    tensor_memory: int
    matrix: str
    binary: bytes | None


WIDTHS: Final = ("size", "num_in", "num_out")
"""What kernels call a width of the model."""


def aligned(name: str, kind: str) -> bool:
    """Whether Triton may take argument `name` of type `kind` to be a multiple of 16, as it finds at a launch.

    torch aligns what it allocates; strides are multiples of the head size or of a width of the model, and these are
    multiples of 16. Without this no load is vectorised, and the registers and spills would be those of code that never
    runs.
    """
    return kind.startswith("*") or "stride" in name or name in WIDTHS


def build(config: Config, target: Target) -> Built:
    """Compile `config` for `target`. Triton's compiler is not thread safe.

    Raises ValueError where the signature does not fit the kernel, or in Triton's interpreter, which has no compiler.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(config.fn, triton.runtime.JITFunction):
        raise ValueError(f"`{config.name}` cannot be built: its module was imported with TRITON_INTERPRET set")
    names = list(config.fn.arg_names)
    named = set(config.signature) | set(config.constexprs)
    if named != set(names) or set(config.signature) & set(config.constexprs):
        raise ValueError(f"`{config.name}` must name each argument once: {sorted(named ^ set(names))}")
    signature = {name: config.signature.get(name, "constexpr") for name in names}
    source = ASTSource(
        config.fn,
        signature,
        {(names.index(name),): value for name, value in config.constexprs.items()},
        {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if aligned(name, signature[name])},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    chip = GPUTarget(target.backend, target.arch, target.warp_size)
    compiled: Any = triton.compile(source, target=chip, options=options)
    shared_bytes = compiled.metadata.shared
    tensor_memory = getattr(compiled.metadata, "tmem_size", 0)
    if target.backend == "hip":
        read = read_amdgcn(compiled.asm["amdgcn"])
        binary: bytes = compiled.asm["hsaco"]
    else:
        binary = compiled.asm["cubin"]
        read = read_sass(_disassemble(binary))
    return Built(
        registers=read.registers,
        spills=read.spills,
        scalar_spills=read.scalar_spills,
        stack_bytes=read.stack_bytes,
        shared_bytes=shared_bytes,
        tensor_memory=tensor_memory,
        matrix=read.matrix,
        binary=binary,
    )


@dataclass(frozen=True, slots=True)
class Code:
    """What the text of machine code says; fields as `Built`'s."""

    registers: int
    spills: int
    scalar_spills: int
    stack_bytes: int
    matrix: str


def _disassemble(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "kernel.cubin")
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


_RESOURCES: Final = re.compile(r"\bREG:(\d+) STACK:(\d+)\b")
_SASS: Final = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)", re.MULTILINE)


def read_sass(text: str) -> Code:
    """From what `cuobjdump -res-usage -sass` prints of one kernel.

    LDL and STL are the loads and stores of a thread's own memory. The matrix classes are HMMA, HGMMA, UTCHMMA, DMMA and
    the like (HFMA2.MMA is none: its stem is HFMA2).
    """
    resources = _RESOURCES.search(text)
    opcodes = _SASS.findall(text)
    if resources is None or not opcodes:
        raise ValueError(f"cuobjdump printed no kernel: {text[:200]!r}")
    spills = sum(opcode in ("LDL", "STL") for opcode in opcodes)
    matrix = "+".join(sorted({opcode for opcode in opcodes if opcode.endswith("MMA")})) or "none"
    return Code(int(resources[1]), spills, 0, int(resources[2]), matrix)


_MFMA: Final = re.compile(r"\bv_s?mfmac?_[a-z]+\d+_\d+x\d+x\d+(?:_\d+b)?_?([a-z]+\d+)")


def read_amdgcn(text: str) -> Code:
    """From AMD assembly of one kernel. MFMA is that of 16-bit factors; others name their type, as MFMA.F32."""

    def figure(name: str) -> int:
        found = re.search(rf"^\s*(?:- )?\.{name}:\s+(\d+)$", text, re.MULTILINE)
        if found is None:
            raise ValueError(f"the assembly does not say `.{name}`")
        return int(found[1])

    factors = set(_MFMA.findall(text))
    classes = {"MFMA" if kind in ("f16", "bf16") else f"MFMA.{kind.upper()}" for kind in factors}
    return Code(
        figure("vgpr_count"),
        figure("vgpr_spill_count"),
        figure("sgpr_spill_count"),
        figure("private_segment_fixed_size"),
        "+".join(sorted(classes)) or "none",
    )
