//! The names and attributes in a mount, read from the live store. Independent of FUSE.
//!
//! ```text
//!   /by-id/<digest>/{manifest.json, memory, state, …}
//!   /templates/<name>/<tag>  ->  ../../by-id/<digest>
//! ```
//! Inode numbers are computed from the names, so that a server accepts the numbers that its predecessor returned. If a
//! number is not in the map of the server, the server searches the whole store for the number.

pub mod condemned;
pub mod node;
pub mod open_templates;

use std::collections::HashSet;
use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dashmap::{DashMap, Entry};
use stencilfs::store::{Digest, Serving, Store, TagName, Template, inode_number, path_inode_number};
use stencilfs::units::Bytes;

use self::condemned::Condemned;
use self::node::{Attributes, DirectoryEntry, Kind, MANIFEST, NameLifetime, Node, ROOT};
use self::open_templates::OpenTemplates;
use crate::server::refusal::Refusal;

/// Number of new inode numbers after which the inode numbers of removed templates are dropped from the map.
const MAX_ENTERED: usize = 1 << 16;

/// Largest number of entries in one listing. A listing may be shorter than a reply: the kernel asks for the rest.
const MAX_LISTED: usize = 1024;

/// Decides how the next open of a file is served.
pub trait ServingPolicy {
    /// Returns how the file with index `file` of `template` is served.
    fn serving(&self, template: &Template, file: usize) -> Serving;
    /// Returns how long the kernel may cache the inode number of that file.
    fn lifetime(&self, template: &Template, file: usize) -> NameLifetime;
}

/// The tree of one store.
#[derive(Debug)]
pub struct Tree {
    store: Store,
    secret: [u8; 32],
    nodes: DashMap<u64, Node>,
    templates: OpenTemplates,
    condemned: Arc<Condemned>,
    /// Number of inode numbers entered since those of removed templates were last dropped.
    entered: AtomicUsize,
}

impl Tree {
    /// Creates the tree of a store, of which at most `open` templates are kept open.
    pub fn new(store: Store, open: usize, condemned: Arc<Condemned>) -> Tree {
        let secret = store.secret();
        let templates = OpenTemplates::new(open);
        let (nodes, entered) = (DashMap::new(), AtomicUsize::new(0));
        let tree = Tree { store, secret, nodes, templates, condemned, entered };
        tree.nodes.insert(ROOT, Node::Root);
        tree
    }

    /// Returns the node with an inode number.
    ///
    /// # Errors
    /// Returns [`Refusal::Stale`] if nothing in the store has this number.
    pub fn node(&self, ino: u64) -> Result<Node, Refusal> {
        if let Some(node) = self.nodes.get(&ino) {
            return Ok(node.clone());
        }
        self.walk()?;
        self.nodes.get(&ino).map(|n| n.clone()).ok_or(Refusal::Stale)
    }

    /// Enters the inode numbers of all nodes in the store.
    fn walk(&self) -> Result<(), Refusal> {
        self.enter(Node::ById);
        self.enter(Node::Templates);
        for name in self.store.tag_names().map_err(|e| refuse(&e))? {
            for tag in self.store.tags_named(&name).map_err(|e| refuse(&e))? {
                self.enter(Node::Tag(tag));
            }
            self.enter(Node::Name(name));
        }
        for digest in self.store.digests().map_err(|e| refuse(&e))? {
            self.enter(Node::Template(digest));
            self.enter(Node::Manifest(digest));
            // A template that cannot be opened has no files here; the reason is logged when it is accessed.
            let template = match self.template(&digest) {
                Ok(template) => template,
                Err(Refusal::Away) => return Err(Refusal::Away),
                Err(_) => continue,
            };
            for file in 0..template.files().len() {
                for serving in Serving::ALL {
                    self.enter(Node::File(digest, file, serving));
                }
            }
        }
        Ok(())
    }

    fn enter(&self, node: Node) -> u64 {
        let ino = self.ino(&node);
        if let Entry::Vacant(free) = self.nodes.entry(ino) {
            free.insert(node);
            self.entered.fetch_add(1, Ordering::Relaxed);
        }
        ino
    }

    /// Drops the inode numbers of templates that the store no longer has, so that the map is bounded by the size of
    /// the store and not by its history.
    fn bound_nodes(&self) {
        if self.entered.load(Ordering::Relaxed) < MAX_ENTERED {
            return;
        }
        self.entered.store(0, Ordering::Relaxed);
        let Ok(digests) = self.store.digests() else { return };
        let digests: HashSet<Digest> = digests.into_iter().collect();
        self.nodes.retain(|_, node| match node {
            Node::Template(digest) | Node::Manifest(digest) | Node::File(digest, ..) => {
                digests.contains(digest)
            }
            // The next lookup enters the inode number again.
            Node::Name(_) | Node::Tag(_) => false,
            Node::Root | Node::ById | Node::Templates => true,
        });
        self.templates.retain(&digests);
    }

    /// Returns the inode number of a node.
    pub fn ino(&self, node: &Node) -> u64 {
        match node {
            Node::Root => ROOT,
            Node::ById => self.keyed("by-id"),
            Node::Templates => self.keyed("templates"),
            Node::Template(digest) => self.keyed(&format!("by-id/{digest}")),
            Node::Manifest(digest) => inode_number(&self.secret, digest, MANIFEST, Serving::Decode),
            Node::File(digest, file, serving) => {
                // The template was open before: the index of the file comes from there.
                let name = self.templates.name(digest, *file).unwrap_or_default();
                inode_number(&self.secret, digest, &name, *serving)
            }
            Node::Name(name) => self.keyed(&format!("templates/{name}")),
            Node::Tag(tag) => self.keyed(&format!("templates/{}/{}", tag.name(), tag.tag())),
        }
    }

    /// Returns 63 bits of a keyed hash of a path, never 0 or 1.
    fn keyed(&self, path: &str) -> u64 {
        path_inode_number(&self.secret, path)
    }

    /// Returns an open template, opened if necessary.
    ///
    /// # Errors
    /// Returns the refusal for an error of the store, which is logged unless the template is missing or the store is
    /// away.
    pub fn template(&self, digest: &Digest) -> Result<Arc<Template>, Refusal> {
        self.templates.get(&self.store, digest).map_err(|e| refuse(&e))
    }

    /// Returns the templates that can be opened and are not condemned, the newest first.
    pub fn newest(&self) -> Vec<Digest> {
        let digests = self.store.digests().unwrap_or_default();
        let present = digests.into_iter().filter(|digest| !self.condemned.holds(digest));
        let created = |digest| Some((self.store.template(&digest).ok()?.policy().created, digest));
        let mut all: Vec<(u64, Digest)> = present.filter_map(created).collect();
        all.sort_by_key(|(created, _)| std::cmp::Reverse(*created));
        all.into_iter().map(|(_, digest)| digest).collect()
    }

    /// Same as [`template`](Self::template), for requests on open files: while a removal is undecided, the template may
    /// disappear from the store and come back.
    ///
    /// # Errors
    /// Same as [`template`](Self::template), but [`Refusal::Away`] for a template that is missing during that time.
    pub fn template_in_use(&self, digest: &Digest) -> Result<Arc<Template>, Refusal> {
        self.template(digest).map_err(|refusal| {
            let undecided = self.condemned.holds(digest) && !self.condemned.is_removed(digest);
            if refusal == Refusal::NoEntry && undecided { Refusal::Away } else { refusal }
        })
    }

    /// Looks up a name in a directory. Returns the attributes of the node, and how long the kernel may cache the name.
    ///
    /// # Errors
    /// Returns [`Refusal::NoEntry`], [`Refusal::NotDirectory`], or the refusal for an error of the store.
    pub fn lookup(
        &self,
        parent: u64,
        name: &OsStr,
        policy: &impl ServingPolicy,
    ) -> Result<(Attributes, NameLifetime), Refusal> {
        let parent = self.node(parent)?;
        let name = name.to_str().ok_or(Refusal::NoEntry)?;
        let node = self.child(&parent, name, policy)?;
        let lifetime = match &node {
            Node::Root | Node::ById | Node::Template(_) => NameLifetime::Long,
            Node::Templates | Node::Name(_) | Node::Tag(_) | Node::Manifest(_) => NameLifetime::Zero,
            Node::File(digest, file, _) => policy.lifetime(&*self.template(digest)?, *file),
        };
        self.bound_nodes();
        self.enter(node.clone());
        Ok((self.attributes_of(&node)?, lifetime))
    }

    fn child(&self, parent: &Node, name: &str, policy: &impl ServingPolicy) -> Result<Node, Refusal> {
        match (name, parent) {
            // The kernel looks up "." to reconnect a file handle (open_by_handle_at(2)).
            (".", Node::Template(digest) | Node::Manifest(digest) | Node::File(digest, ..))
                if self.gone(digest)? =>
            {
                return Err(Refusal::NoEntry);
            }
            (".", _) => return Ok(parent.clone()),
            ("..", _) => return Ok(parent.parent()),
            _ => {}
        }
        match parent {
            Node::Root => match name {
                "by-id" => Ok(Node::ById),
                "templates" => Ok(Node::Templates),
                _ => Err(Refusal::NoEntry),
            },
            Node::ById => match name.parse::<Digest>() {
                // Only the canonical spelling is accepted: uppercase digits would give the directory a second name.
                Ok(digest) if digest.to_string() == name && !self.gone(&digest)? => {
                    Ok(Node::Template(digest))
                }
                _ => Err(Refusal::NoEntry),
            },
            Node::Template(digest) if self.gone(digest)? => Err(Refusal::NoEntry),
            Node::Template(digest) if name == MANIFEST => Ok(Node::Manifest(*digest)),
            Node::Template(digest) => {
                let template = self.template(digest)?;
                let file = template.file(name).ok_or(Refusal::NoEntry)?;
                Ok(Node::File(*digest, file, policy.serving(&template, file)))
            }
            Node::Templates => {
                if self.store.has_name(name).map_err(|e| refuse(&e))? {
                    Ok(Node::Name(name.to_owned()))
                } else {
                    Err(Refusal::NoEntry)
                }
            }
            Node::Name(repository) => {
                let tag = TagName::new(repository, name).map_err(|_| Refusal::NoEntry)?;
                match self.store.tag(&tag).map_err(|e| refuse(&e))? {
                    Some(_) => Ok(Node::Tag(tag)),
                    None => Err(Refusal::NoEntry),
                }
            }
            Node::Manifest(_) | Node::File(..) | Node::Tag(_) => Err(Refusal::NotDirectory),
        }
    }

    /// Closes all open templates. The next request opens a template again.
    pub fn close_templates(&self) {
        self.templates.close();
    }

    /// Returns true if the template cannot be looked up or opened: it is removed from the store, or condemned. Open
    /// files of the template are still served.
    ///
    /// # Errors
    /// Returns [`Refusal::Away`] if the store cannot be reached.
    pub fn gone(&self, digest: &Digest) -> Result<bool, Refusal> {
        if self.condemned.holds(digest) { Ok(true) } else { self.removed(digest) }
    }

    /// Returns true if the store no longer has the template.
    ///
    /// # Errors
    /// Same as [`gone`](Self::gone).
    pub fn removed(&self, digest: &Digest) -> Result<bool, Refusal> {
        self.store.find(digest).map(|found| !found).map_err(|e| refuse(&e))
    }

    /// Returns the attributes of a node, for stat(2).
    ///
    /// # Errors
    /// Returns [`Refusal::Stale`] if the inode number no longer exists, or the refusal for an error of the store.
    pub fn attributes(&self, ino: u64) -> Result<Attributes, Refusal> {
        let node = self.node(ino)?;
        self.attributes_of(&node).map_err(|r| if r == Refusal::NoEntry { Refusal::Stale } else { r })
    }

    fn attributes_of(&self, node: &Node) -> Result<Attributes, Refusal> {
        let plain = |kind, mode, size: u64| Attributes {
            ino: self.ino(node),
            kind,
            mode,
            uid: 0,
            gid: 0,
            size: Bytes::new(size),
            data: Bytes::ZERO,
            created: 0,
        };
        Ok(match node {
            Node::Root | Node::ById | Node::Templates | Node::Name(_) => plain(Kind::Directory, 0o555, 0),
            Node::Template(digest) => match self.store.template(digest) {
                // A user who may not read the files must not learn their names either.
                Ok(template) => {
                    let (policy, all) = (template.policy(), plain(Kind::Directory, 0o555, 0));
                    let read = policy.mode & 0o444;
                    Attributes { mode: read | read >> 2, uid: policy.uid, gid: policy.gid, ..all }
                }
                Err(_) => plain(Kind::Directory, 0o500, 0),
            },
            Node::Tag(_) => plain(Kind::Symlink, 0o777, self.target(node)?.len() as u64),
            Node::Manifest(digest) | Node::File(digest, ..) => {
                // Reopened if possible, as the policy (mode, owner) may have changed.
                let fresh = self.store.template(digest).map(Arc::new);
                let template = fresh.or_else(|_| self.template(digest))?;
                let (size, data) = match node {
                    Node::File(_, file, _) => {
                        let file = template.files().get(*file).ok_or(Refusal::NoEntry)?;
                        (file.size, file.data_bytes)
                    }
                    _ => {
                        let length = Bytes::new(template.manifest_json().len() as u64);
                        (length, length)
                    }
                };
                let policy = template.policy();
                Attributes {
                    mode: policy.mode & 0o555,
                    uid: policy.uid,
                    gid: policy.gid,
                    size,
                    data,
                    created: policy.created,
                    ..plain(Kind::File, 0, 0)
                }
            }
        })
    }

    /// Returns the target of a tag's symbolic link.
    ///
    /// # Errors
    /// Returns [`Refusal::Invalid`] if the node is not a tag, and [`Refusal::NoEntry`] if the tag is removed.
    pub fn read_link(&self, ino: u64) -> Result<String, Refusal> {
        self.target(&self.node(ino)?)
    }

    fn target(&self, node: &Node) -> Result<String, Refusal> {
        let Node::Tag(tag) = node else { return Err(Refusal::Invalid) };
        match self.store.tag(tag).map_err(|e| refuse(&e))? {
            Some(digest) => Ok(format!("../../by-id/{digest}")),
            None => Err(Refusal::NoEntry),
        }
    }

    /// Returns the next entries of a directory by cookie: at most [`MAX_LISTED`], with cookies above `after`.
    ///
    /// # Errors
    /// Returns [`Refusal::NotDirectory`], or the refusal for an error of the store.
    pub fn list(
        &self,
        ino: u64,
        after: u64,
        policy: &impl ServingPolicy,
    ) -> Result<Vec<DirectoryEntry>, Refusal> {
        let node = self.node(ino)?;
        let mut children: Vec<(String, Node)> = match &node {
            Node::Root => vec![("by-id".into(), Node::ById), ("templates".into(), Node::Templates)],
            Node::ById => {
                let all = self.store.digests().map_err(|e| refuse(&e))?;
                all.into_iter().map(|d| (d.to_string(), Node::Template(d))).collect()
            }
            Node::Template(digest) if self.gone(digest)? => Vec::new(),
            Node::Template(digest) => {
                let template = self.template(digest)?;
                let files = template.files().iter().enumerate().map(|(i, file)| {
                    (file.name.clone(), Node::File(*digest, i, policy.serving(&template, i)))
                });
                files.chain([(MANIFEST.to_owned(), Node::Manifest(*digest))]).collect()
            }
            Node::Templates => {
                let names = self.store.tag_names().map_err(|e| refuse(&e))?;
                names.into_iter().map(|n| (n.clone(), Node::Name(n))).collect()
            }
            Node::Name(name) => {
                let tags = self.store.tags_named(name).map_err(|e| refuse(&e))?;
                tags.into_iter().map(|tag| (tag.tag().to_owned(), Node::Tag(tag))).collect()
            }
            Node::Manifest(_) | Node::File(..) | Node::Tag(_) => return Err(Refusal::NotDirectory),
        };
        children.push((".".into(), node.clone()));
        children.push(("..".into(), node.parent()));
        let mut children: Vec<(u64, String, Node)> = children
            .into_iter()
            .map(|(name, child)| (self.cookie(&name), name, child))
            .filter(|(cookie, ..)| *cookie > after)
            .collect();
        if children.len() > MAX_LISTED {
            children.select_nth_unstable_by_key(MAX_LISTED, |(cookie, ..)| *cookie);
            children.truncate(MAX_LISTED);
        }
        children.sort_unstable_by_key(|(cookie, ..)| *cookie);
        let entry = |(cookie, name, child): (u64, String, Node)| DirectoryEntry {
            cookie,
            ino: self.ino(&child),
            kind: child.kind(),
            name,
        };
        Ok(children.into_iter().map(entry).collect())
    }

    fn cookie(&self, name: &str) -> u64 {
        match name {
            "." => 1,
            ".." => 2,
            name => self.keyed(name).max(3),
        }
    }

    /// Returns the number of templates, and the bytes of data in them, for statfs(2).
    ///
    /// # Errors
    /// Returns the refusal for an error of the store.
    pub fn totals(&self) -> Result<(u64, Bytes), Refusal> {
        let digests = self.store.digests().map_err(|e| refuse(&e))?;
        let data = digests
            .iter()
            .filter_map(|d| self.template(d).ok())
            .map(|t| t.files().iter().map(|f| f.data_bytes).sum())
            .sum();
        Ok((digests.len() as u64, data))
    }
}

/// Returns the refusal for an error of the store. Logs the error, once for each request, unless something is missing or
/// the store is away; an outage is logged once by [`StoreOutage`](crate::server::read::outage::StoreOutage).
fn refuse(error: &stencilfs::error::Error) -> Refusal {
    let refusal = Refusal::from(error);
    if !matches!(refusal, Refusal::NoEntry | Refusal::Away) {
        log::error!("{error}");
    }
    refusal
}
