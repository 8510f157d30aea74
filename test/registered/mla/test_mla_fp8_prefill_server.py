"""FP8 prefill of the MLA backends, on DeepSeek-V3.

Needs four Blackwell GPUs (SM100) and the weights. Not run yet: parsed, imported and
skipped only.
"""

import io
import unittest

import requests

from sglang.srt.utils import (
    is_sm100_supported,
    is_tokenspeed_mla_available,
    kill_process_tree,
)
from sglang.test.ci.ci_register import register_cuda_ci
from sglang.test.kits.eval_accuracy_kit import GSM8KMixin
from sglang.test.test_utils import (
    DEFAULT_DEEPSEEK_NVFP4_MODEL_FOR_TEST,
    DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH,
    DEFAULT_URL_FOR_TEST,
    CustomTestCase,
    popen_launch_server,
    try_cached_model,
)

register_cuda_ci(est_time=1100, suite="nightly-4-gpu-b200", nightly=True)


class MLAFp8PrefillServer(GSM8KMixin):
    attention_backend: str
    base_url = DEFAULT_URL_FOR_TEST
    # What SGLang's other tests of this checkpoint ask of as many questions.
    gsm8k_accuracy_thres = 0.92
    gsm8k_num_questions = 512
    gsm8k_num_threads = 512

    @classmethod
    def setUpClass(cls):
        cls.model = try_cached_model(DEFAULT_DEEPSEEK_NVFP4_MODEL_FOR_TEST)
        cls.output = io.StringIO(), io.StringIO()
        options = ["--trust-remote-code", "--tp", "4"]
        options += ["--quantization", "modelopt_fp4"]
        options += ["--attention-backend", cls.attention_backend]
        options += ["--kv-cache-dtype", "fp8_e4m3"]
        options += ["--model-loader-extra-config", '{"enable_multithread_load": true}']
        cls.process = popen_launch_server(
            cls.model,
            cls.base_url,
            DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH,
            other_args=options,
            return_stdout_stderr=cls.output,
        )

    @classmethod
    def tearDownClass(cls):
        kill_process_tree(cls.process.pid, wait_timeout=60)

    def generate(self, prompt: str) -> dict:
        sampling = {"temperature": 0, "max_new_tokens": 16}
        response = requests.post(
            f"{self.base_url}/generate",
            json={"text": prompt, "sampling_params": sampling},
            timeout=600,
        )
        response.raise_for_status()
        return response.json()

    def test_log_says_that_the_hook_is_on(self):
        log = "".join(stream.getvalue() for stream in self.output)
        self.assertIn("FP8 prefill preparation with the fused producer", log)
        self.assertNotIn("FP8 prefill preparation decline", log)

    def test_prefix_cache_hit(self):
        requests.post(
            f"{self.base_url}/flush_cache", params={"timeout": 60}
        ).raise_for_status()
        # Many pages, and a continuation that rounding does not change.
        prompt = " ".join(f"{i}," for i in range(1, 500))
        cold, warm = self.generate(prompt), self.generate(prompt)
        self.assertEqual(cold["meta_info"]["cached_tokens"], 0)
        self.assertGreater(warm["meta_info"]["cached_tokens"], 0)
        self.assertIn("500, 501", cold["text"])
        self.assertEqual(cold["text"], warm["text"])


@unittest.skipUnless(is_sm100_supported(), "trtllm_mla needs Blackwell GPUs (SM100)")
class TestTRTLLMMLAFp8Prefill(MLAFp8PrefillServer, CustomTestCase):
    attention_backend = "trtllm_mla"


@unittest.skipUnless(
    is_sm100_supported() and is_tokenspeed_mla_available(),
    "tokenspeed_mla needs Blackwell GPUs (SM100) and the package of that name",
)
class TestTokenspeedMLAFp8Prefill(MLAFp8PrefillServer, CustomTestCase):
    attention_backend = "tokenspeed_mla"


if __name__ == "__main__":
    unittest.main()
