// Exits with 0 when Graphite shows a point of the last seconds from statsd's own series: so all of statsd, carbon and
// graphite-web work. In JavaScript, as node is there for statsd anyway and the image promises neither curl nor wget.
const url = "http://127.0.0.1/render?target=statsd.numStats&from=-15s&format=json&noCache=1";

function fail(reason) {
  console.error(reason);
  process.exit(1);
}

const request = require("http").get(url, { timeout: 8000 }, (response) => {
  let body = "";
  response.on("data", (chunk) => { body += chunk; });
  response.on("end", () => {
    if (response.statusCode !== 200) fail(`Graphite answers with status ${response.statusCode}`);
    const [series] = JSON.parse(body);
    if (!series || series.datapoints.every(([value]) => value === null)) fail("no recent point from statsd");
  });
});
request.on("error", (error) => fail(error.message));
request.on("timeout", () => fail("Graphite does not answer in time"));
