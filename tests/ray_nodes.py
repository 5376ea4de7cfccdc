"""Several Ray nodes on one machine, in a process of their own: prints the address, and ends with its input.

python -m tests.ray_nodes 2
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 80 << 20


def main(count: int) -> None:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 4, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False},
    )
    for _ in range(count - 1):
        cluster.add_node(num_cpus=4, object_store_memory=OBJECT_STORE_BYTES)
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
