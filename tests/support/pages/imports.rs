//! The imports between the files of a crate, read from the tokens of its sources. Code for tests is left out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::Path;

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// The names on the way from the root of a crate to a module, or to an item of a module.
pub type Names = Vec<String>;

/// For each node, the nodes that it imports, each with one import as an example.
pub type Graph = BTreeMap<String, BTreeMap<String, String>>;

/// The modules of a crate that have their own file.
pub struct Crate(BTreeMap<Names, Source>);

/// The names in a file.
#[derive(Default)]
struct Source {
    /// The modules that the file declares.
    children: BTreeSet<String>,
    uses: Vec<Use>,
    /// Paths outside of `use`, of at least two names.
    paths: BTreeSet<Names>,
    /// The first name of each path outside of `use`.
    words: BTreeSet<String>,
}

/// One name that a `use` declares.
struct Use {
    path: Names,
    name: String,
    is_public: bool,
}

impl Crate {
    /// Reads a crate from the file of its root module.
    pub fn read(root: &Path) -> Crate {
        let mut modules = BTreeMap::new();
        let mut unread = vec![(Names::new(), root.to_owned(), root.parent().unwrap().to_owned())];
        while let Some((module, file, folder)) = unread.pop() {
            let text = fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
            let mut source = Source::default();
            source.scan(text.parse().unwrap_or_else(|e| panic!("{}: {e}", file.display())));
            for child in &source.children {
                let below = folder.join(child);
                let place = [below.join("mod.rs"), below.with_extension("rs")];
                let place = place.into_iter().find(|place| place.exists());
                unread.push((joined(&module, child), place.unwrap_or_else(|| panic!("no {below:?}")), below));
            }
            modules.insert(module, source);
        }
        Crate(modules)
    }

    /// Returns all modules.
    pub fn modules(&self) -> impl Iterator<Item = &Names> {
        self.0.keys()
    }

    /// Returns the modules of another crate that each module names.
    pub fn names_of(&self, other: &str) -> BTreeSet<(Names, String)> {
        let mut found = BTreeSet::new();
        for (module, source) in &self.0 {
            for path in source.uses.iter().map(|u| &u.path).chain(&source.paths) {
                if let [first, second, ..] = path.as_slice()
                    && first == other
                {
                    found.insert((module.clone(), second.clone()));
                }
            }
        }
        found
    }

    /// Returns what a module imports, from the root of the crate: each path as it is written, and the module that
    /// defines the item. A re-export of an item from a child module is no import, unless the module's own code uses the
    /// item.
    pub fn imports(&self, module: &Names) -> BTreeSet<(Names, Names)> {
        let source = &self.0[module];
        let is_import = |u: &&Use, path: &Names| {
            let target = self.target(path);
            let is_below = target.len() > module.len() && target.starts_with(module);
            !(u.is_public && is_below && !source.words.contains(&u.name))
        };
        let uses = source.uses.iter().filter_map(|u| {
            let path = self.absolute(module, &u.path)?;
            is_import(&u, &path).then_some(path)
        });
        let paths = source.paths.iter().filter_map(|path| {
            let imported = source.uses.iter().find(|u| u.name == path[0]);
            let Some(imported) = imported else { return self.absolute(module, path) };
            let rest = path[1..].iter().cloned();
            Some(self.absolute(module, &imported.path)?.into_iter().chain(rest).collect())
        });
        uses.chain(paths).map(|path| (path.clone(), self.target(&path))).collect()
    }

    /// Returns a path from the root of the crate; `None` for a path of another crate, or of a local item.
    fn absolute(&self, module: &[String], path: &[String]) -> Option<Names> {
        let supers = path.iter().take_while(|name| *name == "super").count();
        let (base, rest) = match path.first()?.as_str() {
            "crate" => (&[][..], &path[1..]),
            "self" => (module, &path[1..]),
            "super" => (&module[..module.len() - supers], &path[supers..]),
            child if self.0[module].children.contains(child) => (module, path),
            _ => return None,
        };
        Some(base.iter().chain(rest).cloned().collect())
    }

    /// Returns the module that defines what this path names. Follows re-exports.
    fn target(&self, path: &[String]) -> Names {
        let mut module = Names::new();
        for (at, name) in path.iter().enumerate() {
            let source = &self.0[&module];
            let is_child = source.children.contains(name);
            // A function may have the name of a module beside it: the last name is the function.
            if !is_child || at + 1 == path.len() {
                let export = source.uses.iter().find(|u| u.is_public && u.name == *name);
                if let Some(mut path_of_item) = export.and_then(|u| self.absolute(&module, &u.path)) {
                    path_of_item.extend_from_slice(&path[at + 1..]);
                    return self.target(&path_of_item);
                }
            }
            if !is_child {
                break;
            }
            module.push(name.clone());
        }
        module
    }

    /// Returns the imports between files.
    pub fn files(&self) -> Graph {
        let mut graph = Graph::new();
        for module in self.modules() {
            for (_, target) in self.imports(module) {
                if target != *module {
                    add(&mut graph, &module_path(module), &module_path(&target), module, &target);
                }
            }
        }
        graph
    }

    /// Returns the imports between the files and folders of each folder, where a folder stands for all files in it.
    pub fn folders(&self) -> Vec<Graph> {
        let mut graphs: BTreeMap<Names, Graph> = BTreeMap::new();
        for module in self.modules() {
            for (_, target) in self.imports(module) {
                let common = module.iter().zip(&target).take_while(|(a, b)| a == b).count();
                if let (Some(_), Some(_)) = (module.get(common), target.get(common)) {
                    let (one, other) = (module_path(&module[..=common]), module_path(&target[..=common]));
                    add(graphs.entry(module[..common].to_vec()).or_default(), &one, &other, module, &target);
                }
            }
        }
        graphs.into_values().collect()
    }
}

/// Returns circles of a graph, each as its imports, so that every node in a circle is in one of them.
pub fn circles(graph: &Graph) -> Vec<Vec<String>> {
    let (mut found, mut seen) = (Vec::new(), BTreeSet::new());
    for start in graph.keys() {
        if seen.contains(start) {
            continue;
        }
        let mut before: BTreeMap<&String, &String> = BTreeMap::new();
        let mut unvisited = VecDeque::from([start]);
        while let Some(node) = unvisited.pop_front().filter(|_| !before.contains_key(start)) {
            for next in graph.get(node).into_iter().flat_map(BTreeMap::keys) {
                if !before.contains_key(next) {
                    before.insert(next, node);
                    unvisited.push_back(next);
                }
            }
        }
        let (mut circle, mut node) = (Vec::new(), start);
        while let Some(from) = before.get(node).filter(|_| before.contains_key(start)) {
            circle.insert(0, graph[*from][node].clone());
            seen.insert(node.clone());
            node = from;
            if node == start {
                break;
            }
        }
        if !circle.is_empty() {
            found.push(circle);
        }
    }
    found
}

fn add(graph: &mut Graph, from: &str, to: &str, module: &[String], target: &[String]) {
    let import = format!("{} imports {}", module_path(module), module_path(target));
    graph.entry(from.to_owned()).or_default().entry(to.to_owned()).or_insert(import);
}

fn joined(module: &[String], name: &str) -> Names {
    module.iter().cloned().chain([name.to_owned()]).collect()
}

/// Formats the path of a module.
pub fn module_path(module: &[String]) -> String {
    if module.is_empty() { "crate".to_owned() } else { module.join("::") }
}

impl Source {
    fn scan(&mut self, stream: TokenStream) {
        let tokens: Vec<TokenTree> = stream.into_iter().collect();
        let mut at = 0;
        while let Some(token) = tokens.get(at) {
            let rest = &tokens[at + 1..];
            at += match token {
                TokenTree::Punct(_) if is_punct(token, '#') && is_cfg_test(rest.first()) => {
                    2 + item_length(&rest[1..])
                }
                TokenTree::Ident(word) if word == "pub" && is_visibility(rest.first()) => 2,
                TokenTree::Ident(word)
                    if word == "use" && !rest.first().is_some_and(|t| is_punct(t, '<')) =>
                {
                    let length = rest.iter().take_while(|token| !is_punct(token, ';')).count();
                    let before = at.checked_sub(1).map(|at| &tokens[at]);
                    // `pub`, or the parentheses of `pub(super)`.
                    let is_public = matches!(before, Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Parenthesis)
                        || before.is_some_and(|token| is_ident(token, "pub"));
                    self.add_uses(&rest[..length], &[], is_public);
                    length + 2
                }
                TokenTree::Ident(word) if word == "mod" => match rest {
                    [TokenTree::Ident(name), end, ..] if is_punct(end, ';') => {
                        self.children.insert(name.to_string());
                        3
                    }
                    _ => panic!("unsupported: a module without its own file, {rest:?}"),
                },
                TokenTree::Ident(word) => {
                    let path = path(word.to_string(), rest);
                    let length = path.len() * 3 - 2;
                    self.words.insert(path[0].clone());
                    // The names behind `<T as Trait>::` are no path of a module.
                    if path.len() > 1 && !is_continued(&tokens[..at]) {
                        self.paths.insert(path);
                    }
                    length
                }
                TokenTree::Group(group) => {
                    self.scan(group.stream());
                    1
                }
                _ => 1,
            };
        }
    }

    /// Adds the names of a tree `a::{b, c::d as e}` below `above`.
    fn add_uses(&mut self, tree: &[TokenTree], above: &[String], is_public: bool) {
        let (mut path, mut name) = (above.to_vec(), None);
        let mut tokens = tree.iter();
        while let Some(token) = tokens.next() {
            match token {
                TokenTree::Ident(word) if word == "as" => name = tokens.next().map(ToString::to_string),
                TokenTree::Ident(word) if word == "self" && !path.is_empty() => {}
                TokenTree::Ident(word) => path.push(word.to_string()),
                TokenTree::Punct(_) if is_punct(token, '*') => name = Some("*".to_owned()),
                TokenTree::Group(group) => {
                    let all: Vec<TokenTree> = group.stream().into_iter().collect();
                    let parts = all.split(|token| is_punct(token, ','));
                    return parts.filter(|p| !p.is_empty()).for_each(|p| self.add_uses(p, &path, is_public));
                }
                _ => {}
            }
        }
        let name = name.or_else(|| path.last().cloned()).unwrap_or_default();
        self.uses.push(Use { path, name, is_public });
    }
}

/// Returns the path that begins with this word.
fn path(first: String, mut rest: &[TokenTree]) -> Names {
    let mut path = vec![first];
    while let [one, two, TokenTree::Ident(word), after @ ..] = rest
        && is_punct(one, ':')
        && is_punct(two, ':')
    {
        path.push(word.to_string());
        rest = after;
    }
    path
}

fn is_continued(before: &[TokenTree]) -> bool {
    matches!(before, [.., one, two] if is_punct(one, ':') && is_punct(two, ':'))
}

fn is_punct(token: &TokenTree, c: char) -> bool {
    matches!(token, TokenTree::Punct(punct) if punct.as_char() == c)
}

fn is_ident(token: &TokenTree, name: &str) -> bool {
    matches!(token, TokenTree::Ident(word) if word == name)
}

/// Returns true for the parentheses of `pub(in crate::store)`, false for those of a tuple with a public field.
fn is_visibility(after_pub: Option<&TokenTree>) -> bool {
    let Some(TokenTree::Group(group)) = after_pub else { return false };
    let first = group.stream().into_iter().next();
    let words = ["in", "crate", "super", "self"];
    group.delimiter() == Delimiter::Parenthesis
        && first.is_some_and(|first| words.iter().any(|word| is_ident(&first, word)))
}

fn is_cfg_test(attribute: Option<&TokenTree>) -> bool {
    let only_tests = ["[cfg(test)]", "[cfg(all(feature=\"cli\",any(test,fuzzing)))]"];
    attribute.is_some_and(|token| only_tests.contains(&token.to_string().replace(' ', "").as_str()))
}

/// Returns the number of tokens of the item at the start.
fn item_length(tokens: &[TokenTree]) -> usize {
    let is_end = |token: &TokenTree| {
        is_punct(token, ';') || matches!(token, TokenTree::Group(g) if g.delimiter() == Delimiter::Brace)
    };
    let length = tokens.iter().position(is_end).map_or(tokens.len(), |at| at + 1);
    // The semicolon of `use a::{b};`.
    length + usize::from(tokens.get(length).is_some_and(|token| is_punct(token, ';')))
}
