"""What setup.cfg has no words for: a file of site-packages that is outside a package."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPth(build_py):
    def run(self):
        super().run()
        folder = self.build_lib
        if self.editable_mode:
            folder = self.get_finalized_command("install").install_lib
        name = "sglang_mla_fp8_prefill"
        Path(folder, f"{name}.pth").write_text(f"import {name}\n")


setup(cmdclass={"build_py": BuildWithPth})
