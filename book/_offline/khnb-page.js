// What every page gets: a button under each table that saves it as CSV (RFC 4180), made from what the reader sees; and the
// keyboard's way into what scrolls by itself, wide tables, formulas and listings.
(() => {
  "use strict";
  const quote = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const csv = (table) => [...table.rows].map((row) => [...row.cells].map((cell) => quote(cell.innerText.replaceAll("\u00a0", " ").trim())).join(",")).join("\r\n") + "\r\n";

  const add = (table, count) => {
    const caption = table.caption?.innerText.trim() ?? "", number = caption.match(/^Table\s+([\w.]+)/)?.[1];
    const button = document.createElement("button");
    button.type = "button";
    button.className = "khnb-csv";
    button.textContent = "CSV";
    button.setAttribute("aria-label", `Save ${number ? `table ${number}` : `this table (number ${count} of the page)`} as CSV`);
    button.addEventListener("click", () => {
      const page = location.pathname.split("/").at(-1).replace(/\.html$/, "");
      const address = URL.createObjectURL(new Blob(["\ufeff", csv(table)], { type: "text/csv" }));
      Object.assign(document.createElement("a"), { href: address, download: `${page}-table-${number ?? count}.csv` }).click();
      setTimeout(() => URL.revokeObjectURL(address), 1000);
    });
    table.after(button);
  };
  const addAll = () => [...document.querySelectorAll("article table")].filter((t) => !t.closest(".khnb-widget, .khnb-beside, .field-list")).forEach((t, i) => add(t, i + 1));
  const reach = () => document.querySelectorAll('article table, article mjx-container[display="true"], article pre').forEach((part) => {
    if (part.scrollWidth > part.clientWidth || part.scrollHeight > part.clientHeight) part.tabIndex = 0;
  });
  window.addEventListener("load", () => (window.MathJax?.startup?.promise ?? Promise.resolve()).then(reach));
  window.addEventListener("resize", reach);
  document.addEventListener("click", () => setTimeout(reach, 500));  // what was folded has a size once it is open
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", addAll);
  else addAll();
})();
