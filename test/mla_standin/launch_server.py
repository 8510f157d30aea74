"""Stands in for `python -m sglang.launch_server` where there is no SM100 GPU: the same
server, with the same arguments, on the kernels of `mla_standin.kernels`."""

from mla_standin.install import install

# At the top level: the server's workers, which are spawned, import this module.
install()

if __name__ == "__main__":
    import os
    import sys

    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    server_args = prepare_server_args(sys.argv[1:])
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
