"""Paint after several slides on a Dask cluster, side by side.

    pip install -c constraints.txt ".[cluster]"
    python pipelines/cohort/paint.py SLIDE[@MPP] ... -o FOLDER [--size 4096] [--workers 2 | --scheduler ADDRESS]

Without an address it starts a cluster of its own on this machine, on the loopback interface. Killed, the same command
goes on: what is finished is left alone, what was begun continues at its stage, to the same bytes.

On SLURM, with dask-jobqueue (its own package), the workers come from the queue; FOLDER lies on the shared file system:

    from dask_jobqueue import SLURMCluster
    cluster = SLURMCluster(cores=8, processes=8, memory="24GB", walltime="08:00:00", interface="ib0")
    cluster.scale(jobs=10)
    print(cluster.scheduler_address)  # give this as --scheduler, from a node that sees it

A worker takes about 2 GB (a process with torch, and one tile of 1024 pixels).
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from distributed import LocalCluster

from wsi_brush.brush import load_brush
from wsi_brush.cluster import connect
from wsi_brush.encoder import load_encoder
from wsi_brush.errors import WsiBrushError
from wsi_brush.stages import Painting
from wsi_brush.synthesize import synthesize_slide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slides", nargs="+", help="a slide; SLIDE@MPP where its header has no pixel size")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scheduler")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    brush = load_brush()
    encoder = load_encoder(brush.about["encoder"])
    with ExitStack() as stack:
        address = arguments.scheduler
        if address is None:
            address = stack.enter_context(
                LocalCluster(
                    n_workers=arguments.workers, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
                )
            ).scheduler_address
        client = stack.enter_context(connect(address))

        def paint(slide: str) -> str:
            path, _, mpp = slide.partition("@")
            target = arguments.out / f"{Path(path).stem}.ome.zarr"
            if target.exists():
                return f"{target}: there already"
            painting = Painting(size=arguments.size, seed=arguments.seed)
            try:
                done = synthesize_slide(
                    path, target, painting, brush=brush, encoder=encoder, assume_mpp=float(mpp) if mpp else None,
                    client=client,
                )  # fmt: skip
            except WsiBrushError as error:
                return f"failed: {error}"  # a bad slide costs one slide
            return f"{target}: {done.shape[0]} x {done.shape[1]} pixels in {done.seconds:.0f} s"

        with ThreadPoolExecutor(2) as two:  # while one lays out its grid level, the other's tiles are painted
            for line in two.map(paint, arguments.slides):
                print(line, flush=True)


if __name__ == "__main__":
    main()
