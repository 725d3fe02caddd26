"""One more node for the Ray cluster that the environment names, on loopback like its head: ``second_node.py CPUS``.

``ray start --address`` refuses, because the switch that keeps Ray on 127.0.0.1 also forbids a second node. The class
behind it, which Ray's own tests of clusters use too, does not ask. The node ends with the process that started it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from ray._private.node import Node
from ray._private.parameter import RayParams

_ON_PARENT_DEATH = 1

if __name__ == "__main__":
    # Ray has the kernel kill the raylet after us in the same way, and what the raylet started follows it.
    ctypes.CDLL(None).prctl(_ON_PARENT_DEATH, signal.SIGKILL)
    any_ports = {"node_manager_port": 0, "min_worker_port": 0, "max_worker_port": 0, "dashboard_agent_listen_port": 0}
    node = Node(
        RayParams(
            gcs_address=os.environ["RAY_ADDRESS"],
            node_ip_address="127.0.0.1",
            num_cpus=int(sys.argv[1]),
            num_gpus=0,
            object_store_memory=100 * 2**20,
            include_log_monitor=False,
            **any_ports,
        ),
        head=False,
    )
    print(node.node_id, flush=True)
    os.wait()  # for the raylet, the only child
