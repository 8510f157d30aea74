"""Stands in for the SM100 attention kernels, so that a real SGLang server with the
`tokenspeed_mla` or `trtllm_mla` backend runs on other GPUs.

    python -m mla_standin.launch_server --model-path … --attention-backend trtllm_mla

takes `sglang.launch_server`'s arguments; `mla_standin.install.install()`, at the top level
of a script, does the same for `sglang.Engine`.
"""
