"""A small server of OpenAI's chat completions protocol on the embedded model, in a process of its own.

``python chat_server.py FAIL [FOLDER]`` prints its port; FOLDER holds another model. Every FAILth request is answered with
trouble (429 with Retry-After, 500, a connection cut off, in turn); GET /asked tells how many requests came and how many at
once.
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from alignguard.drift import answer_batch, plan_batches
from alignguard.embedded import model_path
from alignguard.loading import load_model

STATE = {"asked": 0, "now": 0, "most": 0, "served": 0, "key": None, "dead": False}
LOCK, MODEL_LOCK = threading.Lock(), threading.Lock()


def serve(every, folder):
    model, tokenizer = load_model(folder)
    model.eval()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def reply(self, status, body, **headers):
            data = json.dumps(body).encode()
            self.over()  # before it is sent: the next request may be here before this thread goes on
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def over(self):
            if self.command == "POST":
                with LOCK:
                    STATE["now"] -= 1

        def do_GET(self):
            if self.path.startswith("/die/"):
                STATE["dead"] = self.path.endswith("1")
            self.reply(200, STATE)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with LOCK:
                STATE["asked"] += 1
                STATE["now"] += 1
                STATE["most"] = max(STATE["most"], STATE["now"])
                STATE["key"] = self.headers.get("Authorization")
                turn = STATE["asked"]
            self.answer(body, turn)

        def answer(self, body, turn):
            if STATE["dead"]:
                return self.reply(503, {"error": "down"}, Retry_After="0")
            if body["model"] != "embedded":
                return self.reply(404, {"error": f"no model {body['model']}"})
            if every and turn % every == 0:
                kind = (turn // every) % 3
                if kind == 0:
                    self.over()
                    self.connection.close()
                    return None
                return self.reply(
                    (429, 500)[kind - 1], {"error": "later"}, **({"Retry_After": "0"} if kind == 1 else {})
                )
            assert body["temperature"] == 0.0
            prompt = body["messages"][0]["content"]
            with MODEL_LOCK:
                (batch,) = plan_batches(tokenizer, [prompt], 1)
                (text,) = answer_batch(model, tokenizer, batch, body["max_tokens"])
                STATE["served"] += 1
            message = {"role": "assistant", "content": f" {text}\n"}
            self.reply(200, {"object": "chat.completion", "choices": [{"index": 0, "message": message}]})
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]), *(sys.argv[2:] or [model_path()]))
