"""Publish a finished model, LoRA adapter or drafter on the Hugging Face Hub, with a card and its parallel decoding.

    python examples/publish.py build/forced user/my-model --base_model Qwen/Qwen3-1.7B --license apache-2.0 --push

Log in first, with `hf auth login`. Without `--push` nothing is sent, and the repository is written to a folder
instead, for you to read. With the small model of this repository:

    python examples/publish.py examples/tiny_qwen3/forced user/tiny-forced --license apache-2.0 --output build/tiny

Others can then use your model with transformers alone, because the repository brings the decoding with it, in the file
custom_generate/generate.py.
"""

import argparse

from jacobi_hf.hub_cards import FolderError, PushError, push_to_hub


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="Folder in which the model, adapter or drafter was saved.")
    parser.add_argument("repo_id", help="Repository, user/name. It is created if it does not exist.")
    parser.add_argument("--base_model", help="Repository of the model that was trained, or that the drafter is for.")
    parser.add_argument("--license", help="License, such as apache-2.0. By default that of the base model's card.")
    parser.add_argument(
        "--results", nargs="*", default=[], help="JSON files of jacobi-hf bench and eval, for the card."
    )
    parser.add_argument("--output", default="build/published", help="New folder for the repository, without --push.")
    parser.add_argument("--push", action="store_true", help="Send the repository as one commit.")
    parser.add_argument("--private", action="store_true", help="Make a new repository private.")
    args = parser.parse_args()

    try:
        # This checks the folder (weights, tokenizer, secrets, pickled files) and adds README.md and custom_generate/.
        done = push_to_hub(
            args.folder,
            args.repo_id,
            base_model=args.base_model,
            license=args.license,
            results=args.results,
            private=args.private or None,
            dry_run=None if args.push else args.output,
        )
    except (FolderError, PushError, ValueError, OSError) as error:
        raise SystemExit(f"Nothing was published. {error}") from None

    print(done.staged.summary())
    if done.url is None:
        print(f"Nothing was sent. The repository is in {args.output}: read its README.md, then run again with --push.")
        return
    print(f"Published: {done.url}")
    call = f'generate(**inputs, custom_generate="{args.repo_id}", trust_remote_code=True)'
    print(f"Use it: {'base_model' if done.staged.kind == 'drafter' else 'model'}.{call}")


if __name__ == "__main__":
    main()
