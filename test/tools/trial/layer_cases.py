"""What a trial asks of a layer."""

# Requests' new tokens, cached ones before them, chunks of these, rows of padding.
CASES = {
    "causal": dict(extend_lens=[1100, 77, 1]),
    "behind chunks": dict(extend_lens=[900, 200], prefix_lens=[2600, 1400], chunks=2),
    "requests without keys": dict(
        extend_lens=[700, 333, 65], prefix_lens=[2100, 0, 130], chunks=2
    ),
    "padding in NaN memory": dict(
        extend_lens=[1000, 130], prefix_lens=[0, 600], chunks=1, pad_rows=14
    ),
}
# New tokens of one request, and cached ones before them.
TIMES = (
    *((1024, 0), (2048, 0), (4096, 0), (8192, 0), (16384, 0), (32768, 0)),
    *((2048, 8192), (8192, 8192)),
)
# Of a layer's GPU time.
PARTS = ("preparation", "attention", "other")
