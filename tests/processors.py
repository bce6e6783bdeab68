"""The tests marked `rounding`, once for each instruction set that oneDNN knows, with one thread and with two:

    make test-processors

A newer processor computes the same product by other kernels, which round otherwise. Libraries can be told to use older
ones (oneDNN by ONEDNN_MAX_CPU_ISA, MKL by MKL_ENABLE_INSTRUCTIONS, torch's own loops by ATEN_CPU_CAPABILITY), so one machine
shows what all older ones do. A set that this processor lacks cannot be shown, and is named as untested.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETS = {  # oneDNN's name: (MKL's, torch's)
    "AVX2": ("AVX2", "avx2"),
    "AVX512_CORE": ("AVX512", "avx512"),
    "AVX512_CORE_VNNI": ("AVX512_E1", "avx512"),
    "AVX512_CORE_AMX": ("AVX512_E4", "avx512"),
    "default": None,
}
NEEDS = {"AVX2": "avx2", "AVX512_CORE": "avx512bw", "AVX512_CORE_VNNI": "avx512_vnni", "AVX512_CORE_AMX": "amx_tile"}
PROBE = """
import torch
a = torch.randn(1, 16, 64, 64)
torch.nn.functional.conv2d(a, torch.randn(16, 16, 3, 3))
b = torch.randn(512, 512).bfloat16()
b @ b
print("torch", torch.backends.cpu.get_cpu_capability())
b.float() @ b.float()
"""


def environment(name, threads):
    found = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if SETS[name]:
        mkl, torch = SETS[name]
        found |= {"ONEDNN_MAX_CPU_ISA": name, "MKL_ENABLE_INSTRUCTIONS": mkl, "ATEN_CPU_CAPABILITY": torch}
    return found


def kernels(environment):
    """What the libraries say that they ran: oneDNN's convolution and bf16 product, torch's loops, MKL's fp32 product."""
    verbose = environment | {"ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"}
    text = subprocess.run([sys.executable, "-c", PROBE], env=verbose, capture_output=True, text=True).stdout
    ran = [match[1] for kind in ("convolution", "matmul") if (match := re.search(rf"exec,cpu,{kind},([^,]+)", text))]
    loops = re.search(r"^torch (\S+)", text, re.M)
    mkl = re.search(r"MKL.*?(Intel\(R\) (?:Advanced|Architecture)[^,]*)", text)
    return ", ".join(["oneDNN " + " and ".join(ran)] + [f"torch {loops[1]}"] * bool(loops) + [mkl[1]] * bool(mkl))


def main():
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    failed = False
    for name in SETS:
        if name != "default" and NEEDS[name] not in flags:
            print(f"{name}: untested, this processor has no {NEEDS[name]}", flush=True)
            continue
        print(f"{name}: {kernels(environment(name, 1))}", flush=True)
        for threads in (1, 2):
            command = [sys.executable, "-m", "pytest", "-q", "-m", "rounding", str(ROOT / "tests"), "-p", "no:cacheprovider"]
            result = subprocess.run(command, env=environment(name, threads), capture_output=True, text=True, cwd=ROOT)
            summary = re.findall(r"^.*(?:passed|failed|error).* in .*$", result.stdout, re.M)
            print(f"  {threads} thread{'s' * (threads > 1)}: {summary[-1] if summary else result.stdout[-2000:]}", flush=True)
            if result.returncode:
                failed = True
                print(result.stdout[-6000:], result.stderr[-2000:], flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
