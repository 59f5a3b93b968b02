// Mounts the book's widgets in a page that has no kernel.
//
// The page embeds, as Jupyter does, the state of every widget in one script element and a place for every view in
// others. Each widget is an anywidget: its state carries its own ES module (`_esm`) and style (`_css`). This host
// reads the state, imports the module and calls its `render({ model, el })`; `el` is a div of class "khnb-widget".
// What a widget would send to Python goes nowhere. It works over http and from a folder, and asks no host for anything.
(() => {
  "use strict";
  const STATE = 'script[type="application/vnd.jupyter.widget-state+json"]';
  const VIEW = 'script[type="application/vnd.jupyter.widget-view+json"]';

  const bytes = (base64) => {
    const text = atob(base64);
    const array = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) array[i] = text.charCodeAt(i);
    return new DataView(array.buffer);
  };

  // The JSON of a view may itself be wrapped in a JSON string.
  const parse = (script) => {
    const value = JSON.parse(script.textContent);
    return typeof value === "string" ? JSON.parse(value) : value;
  };

  // Attributes as JavaScript values: each buffer is put back, as a DataView, at its path in the state.
  const decode = ({ state, buffers = [] }) => {
    const values = structuredClone(state);
    for (const { path, data, encoding } of buffers) {
      if (encoding !== "base64") throw new Error(`a buffer is encoded as ${encoding}; only base64 is known`);
      const holder = path.slice(0, -1).reduce((at, key) => at[key], values);
      holder[path.at(-1)] = bytes(data);
    }
    return values;
  };

  // The part of Backbone's model that anywidget promises to a module.
  const makeModel = (values) => {
    const listeners = new Map();
    const emit = (event, ...args) => [...(listeners.get(event) ?? [])].forEach((call) => call(...args));
    const model = {
      get: (key) => values[key],
      set(key, value) {
        const changes = typeof key === "object" ? Object.entries(key) : [[key, value]];
        const changed = changes.filter(([name, now]) => values[name] !== now);
        changed.forEach(([name, now]) => { values[name] = now; });
        changed.forEach(([name, now]) => emit(`change:${name}`, model, now));
        if (changed.length) emit("change", model);
      },
      on(events, call) {
        for (const event of events.split(/\s+/)) {
          listeners.set(event, [...(listeners.get(event) ?? []), call]);
        }
      },
      off(events, call) {
        if (events == null) return listeners.clear();
        for (const event of events.split(/\s+/)) {
          listeners.set(event, call ? (listeners.get(event) ?? []).filter((known) => known !== call) : []);
        }
      },
      save_changes() {},
      send() {},
    };
    return model;
  };

  const load = async (entry) => {
    const values = decode(entry);
    if (typeof values._esm !== "string") throw new Error("this control needs a running notebook");
    const address = URL.createObjectURL(new Blob([values._esm], { type: "text/javascript" }));
    const module = await import(address).finally(() => URL.revokeObjectURL(address));
    const widget = typeof module.default === "function" ? await module.default() : module.default;
    if (values._css) document.head.append(Object.assign(document.createElement("style"), { textContent: values._css }));
    const model = makeModel(values);
    await widget.initialize?.({ model });
    return { model, widget };
  };

  const mountAll = async () => {
    const script = document.querySelector(STATE);
    const entries = script ? parse(script).state : {};
    const loaded = new Map();  // views of one model share it
    await Promise.all([...document.querySelectorAll(VIEW)].map(async (place) => {
      const el = document.createElement("div");
      el.className = "khnb-widget";
      place.replaceWith(el);
      try {
        const id = parse(place).model_id;
        if (!entries[id]) throw new Error("the page does not hold its state");
        if (!loaded.has(id)) loaded.set(id, load(entries[id]));
        const { model, widget } = await loaded.get(id);
        await widget.render({ model, el });
        el.dataset.state = "mounted";
      } catch (error) {
        el.dataset.state = "failed";
        el.textContent = `This widget could not be shown: ${error.message}.`;
        console.error("khnb-widgets:", error);
      }
    }));
  };

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", mountAll);
  else mountAll();
})();
