"""What sglang_mla_fp8_prefill.pth imports in every Python process: it waits for SGLang."""

import sys


class _Waiting:
    """A finder that finds nothing; no package right below `sglang` is edited."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.startswith("sglang."):
            from prefill_patch.plugin import activate

            activate()
            sys.meta_path.remove(cls)


sys.meta_path.insert(0, _Waiting)
