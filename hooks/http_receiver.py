#!/usr/bin/env python3
"""Receives hooks by HTTP: knows who sends them, and whom their uploads are from.

Run it as `HOOKS_SECRET=... TOKEN=... ./http_receiver.py 8080`, with Flask installed.
"""

import hashlib
import hmac
import os
import sys
import time

from flask import Flask, Response, abort, jsonify, request

SECRET = os.environ["HOOKS_SECRET"].encode()
TOKEN = os.environ["TOKEN"]

app = Flask(__name__)

#: The events that were seen. A real application has them in its database, in the same
#: transaction as what it does with them.
seen: set[str] = set()


@app.before_request
def check_signature() -> None:
    """Refuse what is not signed with our secret, or was signed long ago."""
    fields = request.headers.get("Webhook-Signature", "").split(",")
    signature = dict(field.partition("=")[::2] for field in fields)
    signed_at, given = signature.get("t", ""), signature.get("v1", "")
    signed = signed_at.encode() + b"." + request.get_data()
    expected = hmac.new(SECRET, signed, hashlib.sha256).hexdigest()
    if not hmac.compare_digest(given.encode(), expected.encode()):
        abort(403)
    if abs(time.time() - int(signed_at)) > 300:
        abort(403)


@app.post("/hooks")
def hook() -> Response:
    name, upload = request.headers["Hook-Name"], request.get_json()["upload"]
    if name.startswith("pre-"):
        # What the server forwards of the client's request. It makes no sense to look at it
        # afterwards: a post-hook may come hours later, when the token has expired.
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {TOKEN}".encode()):
            abort(401)
        return jsonify({})
    if request.headers["Hook-Id"] not in seen:
        print(name, upload["id"], upload["metadata"].get("filename"), flush=True)
        seen.add(request.headers["Hook-Id"])
    return jsonify({})


if __name__ == "__main__":
    app.run(port=int(sys.argv[1]) if sys.argv[1:] else 8080)
