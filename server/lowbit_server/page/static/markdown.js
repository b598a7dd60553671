// A model's text as elements that can neither run nor load anything.
//
// marked makes HTML of the markdown; HTML that the model wrote is shown as the text that it is; pictures become their
// words; links keep only http, https and mailto, open elsewhere and show where they lead. DOMPurify then lets only
// the tags and attributes below through, and the page's Content-Security-Policy stands behind both.

import { h } from "./dom.js";
import { Marked } from "./vendor/marked.esm.js";

const TAGS = [
  "a",
  "blockquote",
  "br",
  "code",
  "del",
  "em",
  "h4",
  "h5",
  "h6",
  "hr",
  "li",
  "ol",
  "p",
  "pre",
  "span",
  "strong",
  "table",
  "tbody",
  "td",
  "th",
  "thead",
  "tr",
  "ul",
];
const ATTRIBUTES = ["class", "href", "start", "tabindex"];
const CLASSES = new Set(["target", "scroll"]);
const SCHEMES = ["http:", "https:", "mailto:"];

const escape = (text) =>
  text.replace(/[&<>"']/g, (one) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" })[one]);

/** Where a link leads, or null where it may not lead: relative addresses would be this server's. */
function target(href) {
  let url;
  try {
    url = new URL(href);
  } catch {
    return null;
  }
  return SCHEMES.includes(url.protocol) && !url.username && !url.password ? url : null;
}

const renderer = {
  html: ({ text }) => escape(text),
  image: ({ href, text }) => escape(`[picture: ${text || "without words"}, ${href}]`),
  checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  heading({ tokens, depth }) {
    const level = Math.min(6, depth + 3); // the page's own headings stand above
    return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
  },
  code: ({ text }) => `<pre class="scroll" tabindex="0"><code>${escape(text)}</code></pre>`,
  link({ href, tokens }) {
    const inside = this.parser.parseInline(tokens);
    const url = target(href);
    return url
      ? `<a href="${escape(url.href)}">${inside}</a>`
      : `${inside} <span class="target">[${escape(href)}]</span>`;
  },
};

const marked = new Marked({ gfm: true, breaks: true, renderer });
const purify = globalThis.DOMPurify;

purify.addHook("afterSanitizeAttributes", (element) => {
  const kept = [...element.classList].filter((one) => CLASSES.has(one));
  if (kept.length) element.setAttribute("class", kept.join(" "));
  else element.removeAttribute("class");
  if (element.hasAttribute("href") && (element.nodeName !== "A" || target(element.getAttribute("href")) === null)) {
    element.removeAttribute("href");
  }
});

/** Each link opens elsewhere and is followed by where it leads; one without words is none. */
function showTargets(fragment) {
  for (const link of fragment.querySelectorAll("a")) {
    const url = link.hasAttribute("href") && target(link.getAttribute("href"));
    if (!url || !link.textContent.trim()) {
      link.replaceWith(...link.childNodes);
      continue;
    }
    link.setAttribute("target", "_blank");
    link.setAttribute("rel", "noopener noreferrer nofollow");
    link.after(" ", h("span", { class: "target" }, `[${url.protocol === "mailto:" ? url.pathname : url.host}]`));
  }
  return fragment;
}

/** A fragment for the page. Text that marked cannot read is shown as it is. */
export function markdown(text) {
  let html;
  try {
    html = marked.parse(text);
  } catch {
    html = `<p>${escape(text)}</p>`;
  }
  const fragment = purify.sanitize(html, {
    RETURN_DOM_FRAGMENT: true,
    ALLOWED_TAGS: TAGS,
    ALLOWED_ATTR: ATTRIBUTES,
    ALLOW_ARIA_ATTR: false,
    ALLOW_DATA_ATTR: false,
    ALLOWED_NAMESPACES: ["http://www.w3.org/1999/xhtml"],
  });
  return showTargets(fragment);
}
