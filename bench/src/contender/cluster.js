// The same four services as the other contenders' worker, on Node's cluster.
const cluster = require('node:cluster');
const net = require('node:net');

const [port, workers, serve, backlog] = process.argv.slice(2);

if (cluster.isPrimary) {
  for (let index = 0; index < Number(workers); index++) cluster.fork({ INDEX: index });
} else {
  const index = Buffer.alloc(2);
  index.writeUInt16LE(Number(process.env.INDEX));
  const byte = Buffer.from('x');
  const chunk = Buffer.alloc(64 * 1024, '.');
  process.on('disconnect', () => process.exit());
  net
    .createServer({ noDelay: true }, (socket) => {
      socket.on('error', () => socket.destroy());
      if (serve === 'byte') {
        socket.end(byte);
      } else if (serve === 'stamp') {
        const stamp = Buffer.alloc(8);
        stamp.writeBigUInt64LE(process.hrtime.bigint());
        socket.end(stamp);
      } else if (serve === 'hold') {
        socket.write(index);
        socket.resume();
      } else {
        socket.on('data', (asked) => {
          for (let i = 0; i < asked.length; i++) socket.write(chunk);
        });
      }
    })
    .listen({ port: Number(port), host: '127.0.0.1', backlog: Number(backlog) }, () => {
      process.stdout.write('ready\n');
    });
}
