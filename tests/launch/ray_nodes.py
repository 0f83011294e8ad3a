"""A Ray cluster on this machine, in a process of its own: Ray reads its settings when imported.

It prints the head's address, and then `done` after each line that it reads: `add` or `lose` a node.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

STORE_BYTES = 100 * 2**20
WORKERS = 2


def main() -> None:
    head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = []
    print(cluster.address, flush=True)
    try:
        for line in sys.stdin:
            if line == "add\n":
                made = cluster.add_node(num_cpus=WORKERS, object_store_memory=STORE_BYTES)
                nodes.append(made)
            else:
                cluster.remove_node(nodes.pop(), allow_graceful=False)
            print("done", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
