#!/usr/bin/env python3
"""Write lib{cuda,cublas,cublasLt,curand,nvrtc}.a: static stand-ins for CUDA's shared libraries.

usage: cuda-stubs.py CUDARC_SOURCE CUDA_MAJOR OUTPUT_DIR      (x86-64 Linux; needs cc and ar)

Why: candle asks cudarc for dynamic linking, so a binary built with the feature `cuda` names libcuda.so.1
and its friends as needed and dies before `main` on a machine without them. One binary for both kinds of
machine needs libraries that are looked for at the first call. Each function here is a jump through a slot;
the slot first leads to a resolver that dlopens the real library, puts the real address into the slot and
goes on there with all argument registers as they came. Where there is no library the slot gets a function
that returns the library's own "not initialised" status, so that opening the device fails as it would on a
machine with a driver and no card, says which library was not found, and the server falls back to the CPU.

The technique is that of lazy binding in an ELF procedure linkage table; yugr/Implib.so does it for any
library. The list of functions comes from cudarc's own bindings: what it can call is here, and no more.
"""

import re
import subprocess
import sys
from pathlib import Path

# Library -> (module of cudarc with its bindings, shared object, status to return where it is missing).
# `{major}` is CUDA's: the ABI of cuBLAS and NVRTC goes with it, that of cuRAND has stayed at 10.
LIBRARIES = {
    "cuda": ("driver", "libcuda.so.1", 100),  # CUDA_ERROR_NO_DEVICE
    "cublas": ("cublas", "libcublas.so.{major}", 1),  # CUBLAS_STATUS_NOT_INITIALIZED
    "cublasLt": ("cublaslt", "libcublasLt.so.{major}", 1),  # CUBLAS_STATUS_NOT_INITIALIZED
    "curand": ("curand", "libcurand.so.10", 101),  # CURAND_STATUS_NOT_INITIALIZED
    "nvrtc": ("nvrtc", "libnvrtc.so.{major}", 11),  # NVRTC_ERROR_INTERNAL_ERROR
}
# After the loader's own search (LD_LIBRARY_PATH, ld.so.cache): where the toolkit's installers put them.
FOLDERS = ["", "/usr/local/cuda/lib64/", "/usr/local/cuda-{major}/lib64/"]

# What a call may carry in registers (System V ABI): six integers, al for variadic calls, eight vectors.
INTEGER_REGISTERS = ["rdi", "rsi", "rdx", "rcx", "r8", "r9", "rax"]
NUM_VECTOR_REGISTERS = 8

RESOLVER = """\
#include <dlfcn.h>

#define LEN(a) (sizeof(a) / sizeof *(a))
static const char *const names[] = {{{names}}};
static const unsigned char kinds[] = {{{kinds}}}; /* of what stands in: STATUS, TEXT, TEXT_OUT */
static const char *const paths[] = {{{paths}}};

extern void *{library}_slots[] __attribute__((visibility("hidden")));

static const char text[] = "{shared_object} was not found";
static long missing_status(void) {{ return {missing}; }}
static const char *missing_text(void) {{ return text; }}
static long missing_text_out(long error, const char **out) {{ (void)error; *out = text; return 0; }}
static void *const missing[] = {{(void *)missing_status, (void *)missing_text, (void *)missing_text_out}};

static void *open_library(void) {{
    for (unsigned i = 0; i < LEN(paths); i++) {{
        void *handle = dlopen(paths[i], RTLD_NOW | RTLD_GLOBAL);
        if (handle) return handle;
    }}
    return 0;
}}

/* Two threads at once both dlopen, which counts references, and store the same address. */
__attribute__((visibility("hidden"))) void *{library}_resolve(long i) {{
    static void *library;
    static int tried;
    if (!__atomic_load_n(&tried, __ATOMIC_ACQUIRE)) {{
        library = open_library();
        __atomic_store_n(&tried, 1, __ATOMIC_RELEASE);
    }}
    void *function = library ? dlsym(library, names[i]) : 0;
    if (!function) function = missing[kinds[i]];
    __atomic_store_n(&{library}_slots[i], function, __ATOMIC_RELEASE);
    return function;
}}
"""


# What stands in for a missing function: most return a status; some return a text, or write one through their
# second argument, and a status in that place would be followed as a pointer.
STATUS, TEXT, TEXT_OUT = range(3)


def bindings(source):
    """The functions of a cudarc `sys` module as {name: kind}."""
    found = re.findall(r'extern "C" \{\s*fn (\w+)\s*\([^;]*?\)(?: -> ([^;]+))?;', source)

    def kind(name, result):
        if name in ("cuGetErrorName", "cuGetErrorString"):
            return TEXT_OUT
        return TEXT if "c_char" in result else STATUS

    return {name: kind(name, result) for name, result in sorted(found)}


def trampolines(library, functions):
    """Assembly: one slot and one jump a function, and the way to the resolver they share."""
    lines = [".text"]
    for i, name in enumerate(functions):
        lines += [f".globl {name}", f".type {name}, @function", f"{name}:"]
        # The slot's first value is the instruction after the jump: push the index, resolve.
        lines += [f" jmp *{library}_slots+{8 * i}(%rip)", f".Lfirst{i}:", f" pushq ${i}", " jmp .Lresolve"]
    room = 16 * NUM_VECTOR_REGISTERS
    index_at = room + 8 * len(INTEGER_REGISTERS)
    lines += [".Lresolve:"]
    lines += [f" pushq %{r}" for r in INTEGER_REGISTERS]
    lines += [f" subq ${room}, %rsp"]
    lines += [f" movdqu %xmm{k}, {16 * k}(%rsp)" for k in range(NUM_VECTOR_REGISTERS)]
    lines += [f" movq {index_at}(%rsp), %rdi"]
    # A C call wants the stack on 16 bytes; rbp survives it and keeps the way back.
    lines += [" pushq %rbp", " movq %rsp, %rbp", " andq $-16, %rsp", f" call {library}_resolve"]
    lines += [" movq %rbp, %rsp", " popq %rbp", " movq %rax, %r11"]
    lines += [f" movdqu {16 * k}(%rsp), %xmm{k}" for k in range(NUM_VECTOR_REGISTERS)]
    lines += [f" addq ${room}, %rsp"]
    lines += [f" popq %{r}" for r in reversed(INTEGER_REGISTERS)]
    lines += [" addq $8, %rsp", " jmp *%r11"]  # drops the index; r11 belongs to nobody across a call
    lines += [".data", ".align 8", f".globl {library}_slots", f".hidden {library}_slots", f"{library}_slots:"]
    lines += [f" .quad .Lfirst{i}" for i in range(len(functions))]
    lines += ['.section .note.GNU-stack,"",@progbits', ""]
    return "\n".join(lines)


def write_archive(library, functions, shared_object, missing, major, out):
    quoted = lambda words: ", ".join(f'"{word}"' for word in words)
    resolver = RESOLVER.format(
        library=library,
        names=quoted(functions),
        kinds=", ".join(str(kind) for kind in functions.values()),
        paths=quoted(folder.format(major=major) + shared_object for folder in FOLDERS),
        shared_object=shared_object,
        missing=missing,
    )
    objects = []
    for suffix, text in ((".S", trampolines(library, functions)), (".c", resolver)):
        source = out / f"{library}_stub{suffix}"
        source.write_text(text)
        objects.append(out / f"{library}_stub{suffix[1:]}.o")
        subprocess.run(["cc", "-c", "-O2", "-fPIC", "-o", objects[-1], source], check=True)
    archive = out / f"lib{library}.a"
    archive.unlink(missing_ok=True)
    subprocess.run(["ar", "rcs", archive, *objects], check=True)
    for leftover in [*objects, *out.glob(f"{library}_stub.*")]:
        leftover.unlink()


def main():
    cudarc, major, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    for library, (module, shared_object, missing) in LIBRARIES.items():
        functions = bindings((cudarc / "src" / module / "sys" / "mod.rs").read_text())
        if not functions:
            sys.exit(f"cuda-stubs.py: found no functions in {cudarc}/src/{module}/sys/mod.rs")
        write_archive(library, functions, shared_object.format(major=major), missing, major, out)
        print(f"lib{library}.a: {len(functions)} functions", file=sys.stderr)


if __name__ == "__main__":
    main()
