"""Write the same text twice with a model: by ordinary decoding, then by Jacobi decoding.

    python examples/generate.py --model Qwen/Qwen3-1.7B --prompt "def quicksort(items):"

On a CPU, with the small model of this repository:

    python examples/generate.py --model examples/tiny_qwen3/checkpoint --prompt "def __init__(self, name, size):"
"""

import argparse
import time

from transformers import AutoModelForCausalLM, AutoTokenizer

import jacobi_hf  # noqa: F401  (the import adds `decoding` to the arguments of generate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Name on the Hub, or a folder.")
    parser.add_argument("--prompt", required=True, help="Text to continue.")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="Longest continuation.")
    parser.add_argument(
        "--dtype", default="auto", help="float32 for exactly equal texts; in bfloat16 two logits can tie."
    )
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, device_map="auto")
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)

    texts = {}
    for decoding in (None, "jacobi_multiblock"):  # None is ordinary decoding
        options = {"decoding": decoding, "max_new_tokens": args.max_new_tokens, "do_sample": False}
        model.generate(**inputs, **options)  # warm up
        start = time.perf_counter()
        output = model.generate(**inputs, **options, return_dict_in_generate=True)
        seconds = time.perf_counter() - start
        new_ids = output.sequences[0, inputs.input_ids.shape[1] :]
        texts[decoding] = tokenizer.decode(new_ids, skip_special_tokens=True)
        tpf = output.jacobi_stats.mean_tokens_per_forward if decoding else 1.0
        print(
            f"{decoding or 'ordinary'}: {len(new_ids) / seconds:.1f} tokens per second, {tpf:.2f} tokens per forward"
        )

    print("The texts are equal." if texts[None] == texts["jacobi_multiblock"] else "The texts differ.")
    print(args.prompt + texts["jacobi_multiblock"])


if __name__ == "__main__":
    main()
