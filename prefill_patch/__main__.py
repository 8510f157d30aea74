import sys

if sys.version_info < (3, 10):
    sys.exit(
        "prefill_patch needs Python 3.10 or newer, not %s" % sys.version.split()[0]
    )
if not __package__:
    # `python -I path/to/prefill_patch` runs this file outside its package.
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prefill_patch.cli import main

if __name__ == "__main__":
    sys.exit(main())
