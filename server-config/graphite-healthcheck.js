// Exits with 0 if Graphite shows a recent point of statsd's own series, which proves that statsd, carbon and
// graphite-web work, and if the dashboard exists. If it does not, this saves it: the image cannot be given a dashboard
// otherwise, and whoever waits for "healthy" then waits for the dashboard too.
// In JavaScript, because the image has node for statsd, and promises neither curl nor wget.
const http = require("http");
const dashboard = require("./graphite-dashboard.json");

// Sends a GET, or with a form a POST, and resolves to the decoded answer.
function ask(path, form) {
  const options = { method: form ? "POST" : "GET", timeout: 8000 };
  if (form) options.headers = { "Content-Type": "application/x-www-form-urlencoded" };
  return new Promise((resolve, reject) => {
    const request = http.request("http://127.0.0.1" + path, options, (response) => {
      let body = "";
      response.on("data", (chunk) => { body += chunk; });
      response.on("end", () => {
        if (response.statusCode === 200) resolve(JSON.parse(body));
        else reject(new Error(`Graphite answers with status ${response.statusCode}`));
      });
    });
    request.on("error", reject);
    request.on("timeout", () => request.destroy(new Error("Graphite does not answer in time")));
    request.end(form);
  });
}

async function checkPoints() {
  const [series] = await ask("/render?target=statsd.numStats&from=-15s&format=json&noCache=1");
  if (!series || series.datapoints.every(([value]) => value === null)) throw new Error("no recent point from statsd");
}

// An existing one is not changed: somebody may have edited it.
async function ensureDashboard() {
  const { state } = await ask(`/dashboard/load/${dashboard.name}`);
  if (state) return;
  const { error } = await ask(`/dashboard/save/${dashboard.name}`, `state=${encodeURIComponent(dashboardState())}`);
  if (error) throw new Error(error);
}

// Graphite stores a graph as its targets, encoded for a URL, and its parameters, which include the targets.
function dashboardState() {
  const graphs = dashboard.graphs.map((graph) => [
    graph.target.map((target) => `target=${encodeURIComponent(target)}`).join("&"),
    graph,
  ]);
  return JSON.stringify({ ...dashboard, graphs });
}

checkPoints().then(ensureDashboard).catch((error) => {
  console.error(error.message);
  process.exit(1);
});
