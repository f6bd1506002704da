"use strict";
// Answers on this machine what the service's page asks its service: GET /ready, and POST /predict with a file's bytes.
(() => {
  const MOST_MAPS = 1024, LONGEST_SIDE = 1024, AT_ONCE = 64, DIE = "0 no die, 1 pass, 2 fail";
  const load = window.fetch.bind(window);
  ort.env.wasm.wasmPaths = new URL("onnxruntime/", document.baseURI).href;
  ort.env.wasm.numThreads = 1; // more need headers that few servers of files send
  const about = load("about.json").then(answer => answer.json());
  const session = ort.InferenceSession.create("model.onnx", { executionProviders: ["wasm"] });
  session.catch(() => {}); // whoever asks is told

  const reply = (content, status = 200) => new Response(JSON.stringify(content), { status });
  const refuse = why => { throw Object.assign(new Error(why), { sentence: true }); };

  function ofJson(bytes) {
    let found;
    try { found = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes)).maps; } catch { refuse("This is no JSON."); }
    if (!Array.isArray(found)) refuse('This has no maps. Wanted: {"maps": [map, ...]}.');
    return found.map((map, i) => {
      const rows = Array.isArray(map) ? map.length : 0, columns = Array.isArray(map?.[0]) ? map[0].length : 0;
      if (!map?.every?.(row => Array.isArray(row) && row.length === columns)) refuse(`map ${i} has no rows of one length.`);
      return { rows, columns, dies: map.flat() };
    });
  }

  function ofNpy(bytes) {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    if (bytes.length < 12 || bytes[0] !== 0x93) refuse("This is no .npy file.");
    const [length, start] = bytes[6] === 1 ? [view.getUint16(8, true), 10] : [view.getUint32(8, true), 12];
    const head = new TextDecoder().decode(bytes.subarray(start, start + length));
    const shape = (/shape\W*\(([^)]*)\)/.exec(head)?.[1] ?? "").split(",").map(Number).filter(side => side > 0);
    if (!/descr\W*['"]\|?u1['"]/.test(head) || ![2, 3].includes(shape.length)) {
      refuse(`This holds ${head.slice(0, 60)}. Wanted: uint8 [rows, columns] or [maps, rows, columns].`);
    }
    const [rows, columns] = shape.slice(-2), n = shape.length === 3 ? shape[0] : 1, size = rows * columns;
    const dies = bytes.subarray(start + length);
    if (dies.length !== n * size) refuse(`The file ends after ${dies.length} of ${n * size} dies.`);
    const columnsFirst = /fortran_order\W*True/.test(head);
    return Array.from({ length: n }, (_, i) => ({ rows, columns, dies: columnsFirst
      ? Uint8Array.from({ length: size }, (_, at) => dies[i + n * (Math.floor(at / columns) + rows * (at % columns))])
      : dies.subarray(i * size, (i + 1) * size) }));
  }

  function check(maps) {
    if (!maps.length || maps.length > MOST_MAPS) refuse(`${maps.length} maps. Allowed: 1 to ${MOST_MAPS}.`);
    maps.forEach(({ rows, columns, dies }, i) => {
      if (!rows || !columns || Math.max(rows, columns) > LONGEST_SIDE) {
        refuse(`map ${i} is ${rows} x ${columns}. Allowed: 1 to ${LONGEST_SIDE} rows and columns.`);
      }
      if (!dies.every(die => die === 0 || die === 1 || die === 2)) refuse(`map ${i} has other values than ${DIE}.`);
    });
    return maps;
  }

  async function probabilitiesOf(maps) {
    const found = new Array(maps.length), bySize = new Map();
    maps.forEach(({ rows, columns }, i) => {
      const size = `${rows} ${columns}`;
      bySize.set(size, [...(bySize.get(size) ?? []), i]);
    });
    const running = await session;
    for (const members of bySize.values()) for (let start = 0; start < members.length; start += AT_ONCE) {
      const some = members.slice(start, start + AT_ONCE), { rows, columns } = maps[some[0]];
      const batch = new Uint8Array(some.length * rows * columns);
      some.forEach((i, place) => batch.set(maps[i].dies, place * rows * columns));
      const { probabilities } = await running.run({ maps: new ort.Tensor("uint8", batch, [some.length, rows, columns]) });
      const classes = probabilities.dims[1];
      some.forEach((i, place) => { found[i] = [...probabilities.data.subarray(place * classes, (place + 1) * classes)]; });
    }
    return found;
  }

  function answer(probabilities, { class_names: names, floors }) {
    const order = names.map((_, i) => i).sort((a, b) => probabilities[b] - probabilities[a]);
    const held = floors && order.filter(i => probabilities[i] >= floors[i]);
    return {
      class: names[order[0]],
      probabilities: Object.fromEntries(names.map((name, i) => [name, probabilities[i]])),
      set: held && held.map(i => names[i]),
      abstain: held && !(held.length === 1 && held[0] === order[0]),
    };
  }

  async function predict(file) {
    try {
      const bytes = new Uint8Array(await file.arrayBuffer());
      const maps = check(file.name.toLowerCase().endsWith(".json") ? ofJson(bytes) : ofNpy(bytes));
      const told = await about;
      return reply({ answers: (await probabilitiesOf(maps)).map(one => answer(one, told)) });
    } catch (error) {
      return reply({ error: error.sentence ? error.message : `This browser could not answer (${error.message}).` }, 422);
    }
  }

  window.fetch = async (where, options = {}) => where === "/ready" ? reply(await about)
    : where === "/predict" ? predict(options.body) : load(where, options);
})();
