"""A GGUF file with further layers behind a model's own, so that a small model has a larger one to draft for.

    python3 benches/deeper_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf DEEPER.gguf --layers 200 --share 0.1

Each further layer is a copy of one of the model's own, and costs as much; but what its attention and its MLP
add is only that share of what the original adds. With 0 all answers are the small model's. Needs numpy
and gguf.
"""

import argparse
import pathlib

import gguf
from gguf import quants

# What writes itself.
OF_FILE = ("GGUF.", "general.architecture")
ADDING = ("attn_output.weight", "ffn_down.weight")


def lessened(tensor, share):
    """The tensor's numbers times a share, in its own type."""
    numbers = quants.dequantize(tensor.data, tensor.tensor_type) * share
    return quants.quantize(numbers, tensor.tensor_type)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("deeper", type=pathlib.Path)
    parser.add_argument("--layers", type=int, required=True, help="in all")
    parser.add_argument("--share", type=float, required=True, help="of what the layer adds that is copied")
    args = parser.parse_args()

    reader = gguf.GGUFReader(args.model)
    architecture = reader.get_field("general.architecture").contents()
    count = f"{architecture}.block_count"
    own = reader.get_field(count).contents()
    writer = gguf.GGUFWriter(args.deeper, architecture)
    for key, field in reader.fields.items():
        if key.startswith(OF_FILE):
            continue
        value = args.layers if key == count else field.contents()
        kind, *element = field.types
        writer.add_key_value(key, value, kind, *element)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for layer in range(own, args.layers):
        prefix = f"blk.{layer % own}."
        for tensor in reader.tensors:
            if tensor.name.startswith(prefix):
                part = tensor.name.removeprefix(prefix)
                data = lessened(tensor, args.share) if part in ADDING else tensor.data
                writer.add_tensor(f"blk.{layer}.{part}", data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
