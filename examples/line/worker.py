#!/usr/bin/env python3
"""An echo server that gets its clients over the line protocol (docs/MIGRATE_FROM_ACL.md).
python3 worker.py /run/dispatcher/line.sock [TYPE]"""
import os
import selectors
import socket
import sys
import time
from urllib.parse import quote

events = selectors.DefaultSelector()
clients, used = 0, 0


def join(path):
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stream.connect(path)
    events.register(stream, selectors.EVENT_READ)
    return stream


def take(stream):
    """One message: the client's address as text, and its descriptor."""
    global clients, used
    address, fds, _, _ = socket.recv_fds(stream, 255, 1)  # Not less than 255 bytes.
    for fd in fds:
        events.register(socket.socket(fileno=fd), selectors.EVENT_READ)
        clients, used = clients + 1, used + 1
    if not address:
        raise OSError("the dispatcher has left")


def echo(client):
    global clients
    try:
        data = client.recv(4096)
        client.sendall(data)
    except OSError:
        data = b""
    if not data:
        clients -= 1
        events.unregister(client)
        client.close()


path, kind, stream, due = sys.argv[1], quote((sys.argv + ["echo"])[2]), None, 0.0
while True:
    try:
        if time.monotonic() >= due:  # Once a second; without the dispatcher, serve on and try to join.
            due = time.monotonic() + 1
            stream = stream or join(path)
            stream.sendall(f"count={clients}&used={used}&pid={os.getpid()}&type={kind}\r\n".encode())
        for key, _ in events.select(max(0.0, due - time.monotonic())):
            take(stream) if key.fileobj is stream else echo(key.fileobj)
    except OSError:
        if stream:
            events.unregister(stream)
            stream.close()
        stream = None
