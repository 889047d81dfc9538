"""Builds FlashInfer's module `trtllm_comm` from the sources of its Python package, for compute capability 9.0, and makes
a wheel of it that the crate takes (`FLASHINFER_RS_WHEELS`), where a wheel of all modules is not at hand.

    pip download --no-deps flashinfer-python==0.6.13 && python3 -m zipfile -e flashinfer_python-*.whl sources
    pip install apache-tvm-ffi nvidia-cuda-nvcc==13.0.* nvidia-cuda-crt==13.0.* nvidia-nvvm==13.0.* \\
        nvidia-cuda-runtime==13.0.* nvidia-cuda-cccl==13.0.* nvidia-curand nvidia-cublas==13.0.*
    python3 benches/comm_wheel.py --flashinfer sources/flashinfer --tvm-ffi SITE/tvm_ffi --cuda SITE/nvidia/cu13 \\
        --out wheels

SITE is where pip installs packages. It takes four minutes, and the module is called as FlashInfer's own wheel has it.
"""

import argparse
import base64
import hashlib
import pathlib
import subprocess
import tempfile
import zipfile

MODULE = "trtllm_comm"
SOURCES = "trtllm_allreduce_fusion", "trtllm_allreduce", "trtllm_moe_allreduce_fusion"
TYPES = "F16", "BF16", "FP8_E4M3", "FP8_E5M2", "FP8_E8M0", "FP4_E2M1"


def compiled(args, folder):
    """The module's bytes."""
    data = args.flashinfer / "data"
    include = [
        data / "include", data / "csrc", data / "cccl/include", data / "cutlass/include",
        data / "cutlass/tools/util/include", data / "spdlog/include", args.tvm_ffi / "include",
        args.cuda / "include", args.cuda / "include/cccl",
    ]  # fmt: skip
    flags = [
        "-std=c++17", "-O3", "-use_fast_math", "-DNDEBUG", "-gencode=arch=compute_90a,code=sm_90a",
        "--expt-relaxed-constexpr", "-w", "-Xcompiler", "-fPIC",
        *(f"-DFLASHINFER_ENABLE_{name}" for name in TYPES), *(f"-I{path}" for path in include),
    ]  # fmt: skip
    objects = [folder / f"{name}.o" for name in SOURCES]
    for name, target in zip(SOURCES, objects, strict=True):
        source = data / "csrc" / f"{name}.cu"
        subprocess.run([args.cuda / "bin/nvcc", *flags, "-c", source, "-o", target], check=True)
    library = folder / f"{MODULE}.so"
    runtime = [f"-L{args.cuda / 'lib'}", "-l:libcudart.so.13", f"-L{args.tvm_ffi / 'lib'}", "-ltvm_ffi"]
    subprocess.run(["g++", "-shared", "-o", library, *objects, *runtime], check=True)
    return library.read_bytes()


def digest(data):
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("flashinfer", "tvm-ffi", "cuda", "out"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--version", default="0.6.13")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        module = compiled(args, pathlib.Path(folder))
    version = f"{args.version}+cu130.sm90a.comm"
    name = f"flashinfer_jit_cache-{version}"
    files = {
        f"{name}.data/purelib/flashinfer_jit_cache/jit_cache/{MODULE}/{MODULE}.so": module,
        f"{name}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: flashinfer-jit-cache\nVersion: {version}\n".encode(),
        f"{name}.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp39-abi3-linux_x86_64\n",
    }
    record = f"{name}.dist-info/RECORD"
    lines = [f"{path},sha256={digest(data)},{len(data)}" for path, data in files.items()]
    files[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    args.out.mkdir(parents=True, exist_ok=True)
    wheel = args.out / f"{name}-cp39-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    print(wheel)


if __name__ == "__main__":
    main()
