"""CALM beside the original package, which is looked for in $BENCH_PEERS/calm-pytorch.

nox -s bench_peers -- calm
"""

from bench_calm_pytorch import main

if __name__ == "__main__":
    main()
