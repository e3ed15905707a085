// The console's first form: asks for the live picture every second and shows it. Names go to the page as text only.
"use strict";

const TOKEN = "fleetgate-owner-token";
const ASK_EVERY_MS = 1000;
const EVENTS_SHOWN = 12;
const byId = (id) => document.getElementById(id);

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function takeTokenFromAddress() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!given) return;
  sessionStorage.setItem(TOKEN, given);
  history.replaceState(null, "", location.pathname); // the token must not stay where it can be copied or bookmarked
}

async function ask(path) {
  const answer = await fetch(path, { headers: { authorization: `Bearer ${sessionStorage.getItem(TOKEN) ?? ""}` } });
  if (answer.status === 401) throw new Error("token");
  if (!answer.ok) throw new Error(`the API answers ${answer.status}`);
  return answer.json();
}

const seconds = (value) =>
  value === null ? "–" : value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`;

function requestsText(outcomes) {
  const total = Object.values(outcomes).reduce((sum, count) => sum + count, 0);
  const parts = Object.entries(outcomes).sort((a, b) => b[1] - a[1]).map(([outcome, count]) => `${count} ${outcome}`);
  return total ? parts.join(" · ") : "0";
}

function facts(rows) {
  const list = element("dl");
  for (const [name, value] of rows) list.append(element("dt", name), element("dd", value));
  return list;
}

function bar(inFlight, limit, name) {
  const made = element("progress");
  made.max = limit || Math.max(1, inFlight);
  made.value = inFlight;
  made.setAttribute("aria-label", `${name}: ${inFlight} in flight${limit ? ` of ${limit}` : ""}`);
  if (limit && inFlight >= limit) made.className = "full";
  return made;
}

function gatewayCard(gateway) {
  const card = element("article", undefined, "card");
  const title = element("div", undefined, "title");
  title.append(element("h3", gateway.name), element("span", gateway.strategy, "quiet"));
  const upstreams = gateway.upstreams.map((upstream) => `${upstream.rank} ${upstream.deployment}`).join(", ");
  card.append(
    title,
    element("p", `https://${gateway.host}${gateway.default ? " · default" : ""}`, "where"),
    facts([
      ["Upstreams by rank", upstreams],
      ["Waiting", `${gateway.waiting} of ${gateway.queue_max}`],
      ["Requests", requestsText(gateway.requests)],
      ["TTFT p50 / p99", `${seconds(gateway.ttft_p50_s)} / ${seconds(gateway.ttft_p99_s)}`],
    ]),
  );
  return card;
}

function stateOf(deployment) {
  if (!deployment.endpoints.length) return ["starting", "unprobed"];
  if (!deployment.up) return ["down", "down"];
  return deployment.endpoints.some((endpoint) => endpoint.probed) ? ["up", ""] : ["not probed yet", "unprobed"];
}

function deploymentCard(deployment) {
  const card = element("article", undefined, "card");
  const title = element("div", undefined, "title");
  const [word, className] = stateOf(deployment);
  title.append(element("h3", deployment.name), element("span", word, `state ${className}`));
  const limit = deployment.limit ? ` of ${deployment.limit}` : "";
  card.append(
    title,
    element("p", `${deployment.region} · ${deployment.engine} · ${deployment.models.join(", ")}`, "where"),
    bar(deployment.in_flight, deployment.limit, deployment.name),
    facts([
      ["In flight", `${deployment.in_flight}${limit}`],
      ["Waiting in engine", String(deployment.waiting)],
      ["Requests", requestsText(deployment.requests)],
      ["TTFT p50 / p99", `${seconds(deployment.ttft_p50_s)} / ${seconds(deployment.ttft_p99_s)}`],
    ]),
  );
  return card;
}

function eventRow(event) {
  const row = element("li");
  const time = element("time", new Date(event.at).toLocaleTimeString());
  time.dateTime = event.at;
  row.append(time, element("span", event.sentence));
  return row;
}

function fill(id, children, emptyText) {
  byId(id).replaceChildren(...(children.length ? children : [element("p", emptyText, "empty")]));
}

function show(state, events) {
  fill("gateways", state.gateways.map(gatewayCard), "No Gateway yet: fleetgate apply -f fleet.yaml");
  fill("deployments", state.deployments.map(deploymentCard), "No Deployment yet.");
  byId("events").replaceChildren(...events.items.reverse().map(eventRow));
  const live = state.workers.filter((worker) => worker.accepting).length;
  byId("workers").textContent = `Snapshot ${state.snapshot_version} · ${live} of ${state.workers.length} workers accept${state.auth === "none" ? " · client keys are not asked for" : ""}`;
  byId("status").textContent = `live, ${new Date(state.now).toLocaleTimeString()}`;
}

function showLogin(message) {
  byId("live").hidden = true;
  byId("login").hidden = false;
  byId("login-error").textContent = message;
  byId("status").textContent = "";
}

async function look() {
  if (!sessionStorage.getItem(TOKEN)) {
    showLogin("");
    return;
  }
  try {
    const [state, events] = await Promise.all([ask("/api/v1/state"), ask(`/api/v1/events?limit=${EVENTS_SHOWN}`)]);
    byId("login").hidden = true;
    byId("live").hidden = false;
    show(state, events);
  } catch (error) {
    if (error.message === "token") {
      sessionStorage.removeItem(TOKEN);
      showLogin("This token is not the owner's.");
      return;
    }
    byId("status").textContent = `no answer from the control plane (${error.message}); traffic is not affected`;
  }
  setTimeout(look, document.hidden ? 5 * ASK_EVERY_MS : ASK_EVERY_MS);
}

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, byId("token").value.trim());
  byId("token").value = "";
  look();
});
takeTokenFromAddress();
look();
