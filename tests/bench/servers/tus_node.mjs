// @tus/server with its file store, as its README starts it; with a certificate also over TLS.
import fs from "node:fs";
import https from "node:https";
import { FileStore } from "@tus/file-store";
import { Server } from "@tus/server";

const [directory, port, cert, key] = process.argv.slice(2);
const server = new Server({ path: "/files", datastore: new FileStore({ directory }) });
const where = { host: "127.0.0.1", port: Number(port) };

if (cert) {
  const pair = { cert: fs.readFileSync(cert), key: fs.readFileSync(key) };
  https.createServer(pair, server.handle.bind(server)).listen(where);
} else {
  server.listen(where);
}
