"""An S3 server (moto) as a process of its own, on loopback: prints its port, serves until its standard input closes.

Whoever started it may die in any way: the pipe closes with it, and the server goes.
"""

import logging
import os
import sys

from moto.server import ThreadedMotoServer

if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    print(server.get_host_and_port()[1], flush=True)
    sys.stdin.read()
    os._exit(0)
