"""Makes the files of other systems for `compare_runtimes.py`, from a dense Whisper.

`ggml-FORMAT.bin`     for whisper.cpp, rounded as its `quantize` tool does
`ct2-int8`            for faster-whisper, where the package ctranslate2 is installed; `ct2-float16` too
`onnx/onnx/…`         with `--onnx FOLDER`, a plain export: its graphs in float32, `…_int8` by ONNX Runtime's dynamic
                      quantisation, and `…_q4` in blocks of 32 weights, each rounded on its own. Both are quantised with
                      the settings of the script with which the files for transformers.js are made. It needs
                      the package onnx-ir

    python -m venv /tmp/optimum && /tmp/optimum/bin/pip install "optimum-onnx[onnxruntime]"
    /tmp/optimum/bin/optimum-cli export onnx --model $(python research/pretrained.py openai/whisper-base) \\
        --task automatic-speech-recognition-with-past /tmp/plain
    python research/make_peers.py --model openai/whisper-base --onnx /tmp/plain --out /tmp/peers-base

What is there already stays.
"""

from __future__ import annotations

import argparse
import shutil
from importlib.util import find_spec
from pathlib import Path

from ggml_blocks import FORMATS
from ggml_writer import write_ggml
from pretrained import resolve_pretrained
from transformers import AutoProcessor, WhisperForConditionalGeneration

GRAPHS = ("encoder_model", "decoder_model_merged")


def write_ggml_files(dense: str, out: Path) -> None:
    """Writes one file for each format."""
    model, processor = (
        WhisperForConditionalGeneration.from_pretrained(dense),
        AutoProcessor.from_pretrained(dense),
    )
    for form in ("f16", *FORMATS):
        path = out / f"ggml-{form}.bin"
        if not path.exists():
            part = path.with_suffix(".part")
            with part.open("wb") as file:
                write_ggml(model, processor, form, file)
            part.replace(path)


def write_ctranslate2(dense: str, out: Path) -> None:
    """Converts to CTranslate2's format in two precisions."""
    from ctranslate2.converters import TransformersConverter

    for precision in ("int8", "float16"):
        folder = out / f"ct2-{precision}"
        if not folder.exists():
            converter = TransformersConverter(dense, copy_files=["tokenizer.json"])
            converter.convert(str(folder), quantization=precision)


def quantize_onnx(dense: str, plain: Path, out: Path) -> None:
    """Quantises the two graphs of a plain export, and copies what a runtime needs beside them."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    graphs = out / "onnx"
    graphs.mkdir(parents=True, exist_ok=True)
    for path in (*plain.glob("*.json"), Path(dense) / "tokenizer.json"):
        shutil.copy(path, out)
    for name in GRAPHS:
        source = plain / f"{name}.onnx"
        shutil.copy(source, graphs)
        model = onnx.load(source)
        # As for transformers.js: a graph with convolutions gets unsigned weights, since the web's runtime needs that.
        has_convolution = any(node.op_type == "Conv" for node in model.graph.node)
        quantize_dynamic(
            model,
            graphs / f"{name}_int8.onnx",
            weight_type=QuantType.QUInt8 if has_convolution else QuantType.QInt8,
            extra_options={"EnableSubgraph": True, "MatMulConstBOnly": True},
        )
        quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=True)
        quantizer.process()
        quantizer.model.save_model_to_file(str(graphs / f"{name}_q4.onnx"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="openai/whisper-base", help="id or folder of the dense Whisper")
    parser.add_argument("--onnx", type=Path, help="folder of optimum's plain export of the model")
    parser.add_argument("--out", type=Path, required=True, help="folder for all files")
    args = parser.parse_args()
    if args.onnx is not None and not all((args.onnx / f"{name}.onnx").is_file() for name in GRAPHS):
        parser.error(f"--onnx must have {' and '.join(f'{name}.onnx' for name in GRAPHS)}, got {args.onnx}")
    dense = resolve_pretrained(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    write_ggml_files(dense, args.out)
    if find_spec("ctranslate2") is None:
        print("without the package ctranslate2 there is no file for faster-whisper")
    else:
        write_ctranslate2(dense, args.out)
    if args.onnx is not None and not (args.out / "onnx" / "onnx" / f"{GRAPHS[1]}_q4.onnx").exists():
        quantize_onnx(dense, args.onnx, args.out / "onnx")


if __name__ == "__main__":
    main()
