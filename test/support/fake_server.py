"""A server that answers as SGLang does over HTTP, and has the faults it is told to."""

import threading
import zlib
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import requests
from e2e import load
from e2e.servers import Server

VOCAB = 4096


def log_probabilities(ids, seed=0):
    """One of each token but the first, and one of the token after the last."""
    rng = np.random.default_rng([seed, zlib.crc32(np.array(ids, np.int32).tobytes())])
    return -3 * rng.random(len(ids))


class FakeServer(Server):
    """A server without processes, which answers what SGLang would over HTTP. `fault`
    names what is wrong with it, `noise` how far its log-probabilities are off, and
    `waits` which requests wait for their abort."""

    def __init__(self, folder, fault="", noise=0.05, seed=1, waits=lambda rid: False):
        super().__init__(folder, folder, folder)
        self.log.write_text("ServerArgs(enable_nan_detection=False) at start\n")
        self.fault, self.noise, self.seed, self.waits = fault, noise, seed, waits
        self.pages = set()
        self.live = set()
        self.aborted = defaultdict(threading.Event)
        self.leaked, self.memory = 0, 900 * load.MIB
        self.asked = Counter()

    def alive(self):
        return self.process is None or self.process.poll() is None

    def gpu_memory(self):
        return self.memory

    def schedulers(self):
        return self.processes()[1:]

    def get(self, path, timeout=60):
        if path == "/health_generate":
            return SimpleNamespace(status_code=503 if self.fault == "ill" else 200)
        assert path == "/v1/loads?include=core"
        one = {"max_total_num_tokens": 65536, "num_used_tokens": self.leaked}
        one |= {"num_running_reqs": len(self.live), "num_waiting_reqs": 0}
        one["num_waiting_reqs"] += self.fault == "never ends"
        return SimpleNamespace(json=lambda: {"loads": [one]})

    def post(self, path, json=None, timeout=60):
        self.asked[path] += 1
        if path == "/abort_request":
            return self.aborted[json["rid"]].set()
        response = requests.Response()
        response.status_code = 200
        if path.startswith("/flush_cache"):
            self.pages.clear()
            response.status_code = 500 if self.fault == "does not flush" else 200
            return response
        assert path == "/generate"
        key = json.get("rid", object())
        assert key not in self.live
        self.live.add(key)
        try:
            body = self.answer(json, self.aborted[key])
        finally:
            self.live.remove(key)
            self.aborted.pop(key)
        return SimpleNamespace(status_code=200, json=lambda: body)

    def answer(self, json, aborted):
        ids, rid = json["input_ids"], json.get("rid", "")
        count = json["sampling_params"]["max_new_tokens"]
        if self.process is not None and self.asked["/generate"] > 12:
            self.process.wait()
            raise requests.ConnectionError("connection reset")
        chosen = rid.endswith("7") if rid else len(ids) % 2
        if self.fault != "ignores" and self.waits(rid):
            aborted.wait(5)
        hit_others = self.fault == "aborts others" and chosen
        if hit_others or (self.fault != "ignores" and aborted.is_set()):
            self.leaked += 64 * (self.fault == "leaks")
            reason = {"type": "abort", "message": "Aborted"}
            meta = {"id": rid, "finish_reason": reason}
            return {"output_ids": [5], "meta_info": meta}
        if self.fault == "loses" and chosen:
            raise requests.ReadTimeout("timed out")
        if self.fault == "mixes up under load" and chosen and len(self.live) > 1:
            ids = ids[::-1]
        noise = self.noise * log_probabilities(ids, self.seed)
        values = (log_probabilities(ids) + noise).tolist()
        outputs = [zlib.crc32(b"%d" % i) % VOCAB for i in range(count)]
        start = json.get("logprob_start_len", len(ids))
        cached, limit = 0, min(len(ids) - 1, start)
        while cached + 64 <= limit and tuple(ids[: cached + 64]) in self.pages:
            cached += 64
        self.pages |= {tuple(ids[:n]) for n in range(64, len(ids) + 1, 64)}
        if self.fault == "nan" and chosen:
            values[-1] = None
        meta = {
            "id": "another" if self.fault == "swaps" and chosen else rid,
            "finish_reason": {"type": "length", "length": count},
            "cached_tokens": 0 if self.fault == "cold" else cached,
            "num_retractions": int(chosen and self.fault != "never retracts"),
            "input_token_logprobs": [
                [None, ids[start - len(ids)], None],
                *([x, 1, None] for x in values[start:-1]),
            ],
            "output_token_logprobs": [[values[-1], 1, None] for _ in outputs],
        }
        return {"output_ids": outputs, "meta_info": meta}
