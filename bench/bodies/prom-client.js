// Records bodies of prom-client, the library of Node.js: npm install prom-client@15.1.3, then
// node prom-client.js text > prom-client.txt; node prom-client.js openmetrics > prom-client.openmetrics
const client = require("prom-client");
const format = process.argv[2] === "openmetrics" ? "OPENMETRICS" : "PROMETHEUS";
const register = new client.Registry(client.Registry[format + "_CONTENT_TYPE"]);
register.setDefaultLabels({ app: "shop", zone: "eu-west" });
client.collectDefaultMetrics({ register });
const labelNames = ["method", "path", "code"];
const requests = new client.Counter({ name: "http_requests_total", help: "Requests.", labelNames, registers: [register] });
const seconds = new client.Histogram({ name: "http_request_seconds", help: "Time of a request.", labelNames, registers: [register] });
const bytes = new client.Summary({ name: "http_response_bytes", help: "Size of an answer.", labelNames, registers: [register] });
const temperature = new client.Gauge({ name: "temperature_celsius", help: 'A "quoted" help\nof two lines.', registers: [register] });
for (let n = 0; n < 4; n++) {
  const labels = { method: n % 2 ? "GET" : "POST", path: "/items/" + (n % 5), code: 200 + (n % 3) };
  requests.inc(labels, n);
  seconds.observe(labels, n / 1e7);
  bytes.observe(labels, n * 1e21);
}
temperature.set(-1.5e-7);
register.metrics().then((body) => process.stdout.write(body));
