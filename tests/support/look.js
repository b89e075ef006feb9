// Measures a report in a browser, and puts what it finds into the document.
"use strict";

const area = (element) => {
    const { left, top, right, bottom } = element.getBoundingClientRect();
    return { element, left, top, right, bottom, name: `${element.tagName} ${element.textContent.slice(0, 40)}` };
};

// Pairs of elements, neither inside the other, that cover the same pixels.
const overlaps = (elements) => {
    const areas = elements.map(area).filter((a) => a.right > a.left && a.bottom > a.top);
    const found = [];
    areas.forEach((a, index) => {
        for (const b of areas.slice(index + 1)) {
            const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
            const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
            const nested = a.element.contains(b.element) || b.element.contains(a.element);
            if (width > 1 && height > 1 && !nested) found.push([a.name, b.name]);
        }
    });
    return found;
};

// The values of a picture, by the colour of their series.
const values = (figure) => {
    const data = Object.fromEntries(Object.entries(figure.dataset).map(([name, text]) => [name, Number(text)]));
    const x = (pixel) => (Number(pixel) - data.left) / (data.right - data.left) * data.xMax;
    const y = (pixel) => (data.bottom - Number(pixel)) / (data.bottom - data.top) * data.yMax;
    const found = { x_step: data.xMax / (data.right - data.left), y_step: data.yMax / (data.bottom - data.top) };
    const add = (kind, element, value) => {
        const series = found[`${kind} ${element.getAttribute("fill")}`] ??= [];
        series.push(value);
    };
    for (const dot of figure.querySelectorAll("circle")) {
        add("dots", dot, [x(dot.getAttribute("cx")), y(dot.getAttribute("cy"))]);
    }
    for (const polygon of figure.querySelectorAll("polygon")) {
        const points = polygon.getAttribute("points").trim().split(/\s+/).map((point) => point.split(","));
        add("areas", polygon, points.map(([left, top]) => [x(left), y(top)]));
    }
    for (const bar of figure.querySelectorAll("rect")) {
        const [left, top, width, height] = ["x", "y", "width", "height"].map((name) => Number(bar.getAttribute(name)));
        add("bars", bar, [x(left), x(left + width), y(top + height), y(top)]);
    }
    return found;
};

const byId = (selector, value) =>
    Object.fromEntries([...document.querySelectorAll(selector)].map((element) => [element.id, value(element)]));

const texts = [...document.querySelectorAll("figure")].flatMap((figure) => overlaps([...figure.querySelectorAll("text")]));
const cut = [...document.querySelectorAll("svg text")].filter((text) => {
    const [inner, outer] = [text.getBoundingClientRect(), text.closest("svg").getBoundingClientRect()];
    return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1;
});
// A cell that is narrower than its words.
const narrow = [...document.querySelectorAll("td, th")].filter((cell) =>
    cell.getBoundingClientRect().height > 160 && cell.textContent.length < 80);
// The brightness of a colour, from 0 to 255.
const brightness = (color) => {
    const [red, green, blue] = color.match(/[\d.]+/g).map(Number);
    return 0.3 * red + 0.6 * green + 0.1 * blue;
};
const background = getComputedStyle(document.body).backgroundColor;
// A text with hardly another brightness than the page.
const unreadable = [...document.querySelectorAll("h1, h2, h3, p, dt, dd, td, th, svg text")].filter((text) => {
    const { color, fill } = getComputedStyle(text);
    return Math.abs(brightness(text.closest("svg") ? fill : color) - brightness(background)) < 60;
});
const findings = {
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    background,
    unreadable: unreadable.map((text) => text.textContent),
    inner_width: window.innerWidth,
    scroll_width: document.documentElement.scrollWidth,
    overlaps: overlaps([...document.querySelectorAll("h1, h2, h3, p, figure, .scroll, .answers div")]),
    text_overlaps: texts,
    cut_texts: cut.map((text) => text.textContent),
    narrow_cells: narrow.map((cell) => cell.textContent),
    titles: [...document.querySelectorAll("h1, h2, h3")].map((title) => title.textContent),
    scripts: document.querySelectorAll("script").length,
    plots: byId("figure[id]", values),
    tables: byId("table[id]", (table) => [...table.tBodies[0].rows].map((row) =>
        [...row.cells].map((cell) => cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value)))),
    figures: JSON.parse(document.getElementById("figures").textContent),
};
const result = document.createElement("script");
result.type = "application/json";
result.id = "findings";
result.textContent = JSON.stringify(findings).replaceAll("<", "\\u003c");
document.body.append(result);
