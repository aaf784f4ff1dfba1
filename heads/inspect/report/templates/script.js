"use strict";
// The page can be read without any of this: then all cases stand below the table, as in a book.
// With it, one view is open at a time, and the part of the address after # says which: `#case=38` a
// case, anything else the overview. So links, bookmarks and the browser's Back work by themselves.
document.documentElement.classList.add("js");
document.addEventListener("DOMContentLoaded", () => {
  const CASE = "#case=";
  const title = document.title;
  const body = document.body;
  const table = document.querySelector("table.cases");
  const headings = [...table.tHead.rows[0].cells];
  const filters = document.querySelector(".filters");
  const notice = document.getElementById("notice");
  const zoom = document.getElementById("zoom");
  // A map, not a selector or an object: an id can be any text, `__proto__` and quotes included.
  const pages = new Map([...document.querySelectorAll("article.case")].map((page) => [page.dataset.case, page]));
  const rowOf = new Map([...table.tBodies[0].rows].map((row) => [row.dataset.case, row]));
  let rows = [...rowOf.values()]; // in the table's present order
  let open = null; // the id of the case that is shown
  let leftAt = 0; // how far the overview was scrolled when a case was opened

  // ---- the table: sorting and filtering -------------------------------------------------------

  const compareText = new Intl.Collator(undefined, { numeric: true }).compare;
  const natural = (row) => Number(row.cells[0].dataset.value);

  function sortBy(column, descending) {
    const numeric = headings[column].querySelector("button").dataset.numeric === "1";
    const value = (row) => row.cells[column].dataset.value;
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      // What has no value stands last either way; equals stay in the natural order of their ids.
      if (x === "" || y === "") return (x === "") - (y === "") || natural(a) - natural(b);
      const order = numeric ? Number(x) - Number(y) : compareText(x, y);
      return (descending ? -order : order) || natural(a) - natural(b);
    });
    table.tBodies[0].append(...rows);
    headings.forEach((heading, i) => {
      heading.setAttribute("aria-sort", i !== column ? "none" : descending ? "descending" : "ascending");
    });
  }

  function filter() {
    const words = filters.elements.find.value.toLowerCase().split(/\s+/).filter(Boolean);
    const kind = filters.elements.class.value;
    const verdict = filters.elements.verdict.value;
    for (const row of rows) {
      row.hidden =
        !words.every((word) => row.dataset.text.includes(word)) ||
        (kind !== "" && row.dataset.class !== kind) ||
        (verdict !== "" && row.dataset.verdict !== verdict);
    }
    const left = rows.filter((row) => !row.hidden).length;
    document.getElementById("count").textContent = `${left} of ${rows.length} cases`;
  }

  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      sortBy(column, heading.getAttribute("aria-sort") === "ascending");
    });
  });
  filters.addEventListener("input", filter);
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.addEventListener("reset", () => setTimeout(filter)); // the fields are emptied after the event
  filter(); // some browsers fill in fields again when a page is reloaded

  // ---- cases: one at a time, in the order and the filter of the table -------------------------

  // The next case that the filter leaves, also from one that it hides: such a case has a place too.
  function neighbour(id, step) {
    for (let i = rows.indexOf(rowOf.get(id)) + step; i >= 0 && i < rows.length; i += step) {
      if (!rows[i].hidden) return rows[i].dataset.case;
    }
    return null;
  }

  function link(element, id) {
    if (id === null) {
      element.removeAttribute("href");
      element.setAttribute("aria-disabled", "true");
    } else {
      element.href = CASE + encodeURIComponent(id);
      element.removeAttribute("aria-disabled");
    }
  }

  function showCase(id) {
    if (open === null) leftAt = window.scrollY;
    else pages.get(open).classList.remove("open");
    const page = pages.get(id);
    open = id;
    body.classList.add("reading");
    page.classList.add("open");
    link(page.querySelector(".previous"), neighbour(id, -1));
    link(page.querySelector(".next"), neighbour(id, 1));
    const left = rows.filter((row) => !row.hidden);
    const place = left.indexOf(rowOf.get(id)) + 1;
    page.querySelector(".position").textContent = place ? `${place} of ${left.length}` : "not in the filtered table";
    document.title = `Case ${id} · ${title}`;
    window.scrollTo(0, 0);
    page.querySelector("h2").focus({ preventScroll: true });
  }

  function showOverview(target) {
    const closed = open;
    if (closed !== null) pages.get(closed).classList.remove("open");
    open = null;
    body.classList.remove("reading");
    document.title = title;
    if (closed !== null && (target === null || target.id === "cases")) {
      // Back from a case: where the reader was before, with the focus on the case just seen.
      window.scrollTo(0, leftAt);
      const seen = rowOf.get(closed);
      if (seen.hidden) return;
      seen.querySelector("a").focus({ preventScroll: true });
      seen.scrollIntoView({ block: "nearest" });
    } else if (target !== null) {
      target.scrollIntoView();
    }
  }

  function decoded(text) {
    try {
      return decodeURIComponent(text);
    } catch {
      return text; // a percent sign that somebody typed
    }
  }

  function route() {
    const hash = window.location.hash;
    const id = hash.startsWith(CASE) ? decoded(hash.slice(CASE.length)) : null;
    notice.hidden = id === null || pages.has(id);
    if (id !== null && pages.has(id)) return showCase(id);
    if (id !== null) notice.textContent = `There is no case ${id} in this report.`;
    showOverview(id === null ? document.getElementById(decoded(hash.slice(1))) : null);
  }

  if ("scrollRestoration" in history) history.scrollRestoration = "manual"; // the two views differ in height
  window.addEventListener("hashchange", route);
  if (window.location.hash) route();

  // ---- keys -----------------------------------------------------------------------------------

  const STEPS = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 };

  document.addEventListener("keydown", (event) => {
    const busy = event.defaultPrevented || event.ctrlKey || event.altKey || event.metaKey || zoom.open;
    if (open === null || busy || event.target.closest("input, select, textarea")) return;
    if (event.key === "Escape") {
      window.location.hash = "#cases";
    } else if (event.key in STEPS) {
      // A table that has the focus and is wider than its box needs the arrows for itself.
      const box = event.target.closest(".scroll");
      if (event.key.startsWith("Arrow") && box && box.scrollWidth > box.clientWidth) return;
      const id = neighbour(open, STEPS[event.key]);
      if (id !== null) window.location.hash = CASE + encodeURIComponent(id);
    }
  });

  // ---- pictures -------------------------------------------------------------------------------

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.zoom");
    if (button === null) return;
    const picture = button.querySelector(".picture");
    zoom.querySelector(".zoomed").replaceChildren(picture.cloneNode(true));
    zoom.querySelector(".zoom-text").textContent = picture.getAttribute("alt") || picture.getAttribute("aria-label");
    zoom.showModal();
  });
  zoom.addEventListener("click", () => zoom.close()); // on the button, the picture or beside it
});
