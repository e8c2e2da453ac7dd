"""`jacobi-hf pack`: turn trajectories into training records."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

from jacobi_hf.cli._errors import check_folder, need
from jacobi_hf.cli._options import verb

if TYPE_CHECKING:
    from jacobi_hf.cli._recipes import Call


def _kinds() -> tuple[type, ...]:
    from jacobi_hf.trainer.data.pack_options import PackConfig

    return (PackConfig,)


@verb(_kinds, json=True)
def pack(call: Call) -> None:
    """Choose noisy states of collected trajectories, and write them with their fixed points in the packed format."""
    from jacobi_hf.cli._recipes import demand

    (config,) = call.parse()
    demand(config, "pack", "sources", "output_dir")
    check_folder(config.output_dir)
    need("train", "datasets", "filelock")
    from jacobi_hf.trainer.data.packing import pack_trajectories
    from jacobi_hf.trainer.data.shards import processes

    call.ending.kept = lambda: f"finished files are kept in {config.output_dir}; the same command goes on from there"
    if not processes().is_main_process:
        return
    amounts = pack_trajectories(config)
    if call.as_json:
        typer.echo(json.dumps({"output_dir": config.output_dir, "trajectories": amounts}, indent=1))
    else:
        taken = ", ".join(f"{count} of {folder}" for folder, count in amounts.items())
        typer.echo(f"{config.output_dir}: {sum(amounts.values()) * config.visits} records; trajectories: {taken}.")
