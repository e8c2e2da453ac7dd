"""`jacobi-hf pack`: from trajectories to training records."""

from __future__ import annotations

import json

import typer

from jacobi_hf.cli._options import check_folder, errors_in_one_line, need


def pack(context: typer.Context) -> None:
    """Choose noisy states of collected trajectories, and write them with their fixed points, in the published packed format."""
    with errors_in_one_line("pack") as ending:
        need("train", "datasets", "filelock")
        from jacobi_hf.cli import _recipes as recipes
        from jacobi_hf.trainer.data.packing import PackConfig, pack_trajectories
        from jacobi_hf.trainer.data.shards import processes

        given = recipes.given(context, PackConfig)
        (config,) = given.parse(PackConfig)
        recipes.demand(config, "pack", "sources", "output_dir")
        check_folder(config.output_dir)
        ending.kept = lambda: f"finished files are kept in {config.output_dir}; the same command goes on from there"
        if not processes().is_main_process:
            return
        amounts = pack_trajectories(config)
    if given.as_json:
        typer.echo(json.dumps({"output_dir": config.output_dir, "trajectories": amounts}, indent=1))
    else:
        taken = ", ".join(f"{count} of {folder}" for folder, count in amounts.items())
        typer.echo(f"{config.output_dir}: {sum(amounts.values()) * config.visits} records; trajectories: {taken}.")
